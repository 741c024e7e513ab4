"""Passkey and needle prompts of an exact length."""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import numpy as np

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
    "them. I will quiz you about the important information there.\n"
)
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
_CITIES = ("London", "Paris", "Tokyo", "Berlin", "Madrid", "Rome", "Cairo", "Lima", "Oslo", "Delhi")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One question: token ids of prompt and answer together, shape (tokens,)."""

    ids: np.ndarray
    answer_tokens: int
    depth: float


def passkey_prompt(
    tokenizer: Any, length: int, depth: float, rng: random.Random, digits: int = 5
) -> Prompt:
    """The paper's passkey prompt, as long as fits into ``length`` tokens.

    Args:
        depth: where the key stands among the filler lines, 0 (start) to 1 (end).

    Raises:
        ValueError: ``length`` holds not even the question.
    """
    key = "".join(rng.choice("0123456789") for _ in range(digits))
    needle = f"The pass key is {key}. Remember it. {key} is the pass key.\n"
    question = "What is the pass key? The pass key is"
    return _prompt(tokenizer, repeat(FILLER), needle, question, key, length, depth)


def question_tokens(tokenizer: Any, digits: int = 5) -> int:
    """Tokens of the shortest prompt of either kind: introduction, needle, question, answer."""
    key = "0" * digits
    city = max(_CITIES, key=len)
    texts = (
        f"{TASK}The pass key is {key}. Remember it. {key} is the pass key.\n"
        f"What is the pass key? The pass key is {key}",
        f"{TASK}The magic number of {city} is {key}.\n"
        f"What is the magic number of {city}? The magic number of {city} is {key}",
    )
    return max(len(tokenizer(text)["input_ids"]) for text in texts) + digits


def require_room(field: str, tokenizer: Any, length: int) -> None:
    """Refuse to ask at a length that does not hold a question.

    Raises:
        ValueError: names the ``field`` that asks for it.
    """
    shortest = question_tokens(tokenizer)
    if shortest > length:
        raise ValueError(
            f"{field}: a passkey question takes {shortest} tokens, and {length} is the length; "
            "choose a longer one, or ask for no keys here (0)"
        )


def needle_prompt(
    tokenizer: Any,
    haystack: Sequence[str],
    length: int,
    depth: float,
    rng: random.Random,
    digits: int = 5,
) -> Prompt:
    """A sentence between the lines of a text (``haystack``), as long as fits.

    Raises:
        ValueError: the text is shorter than ``length`` tokens, or that is too short.
    """
    key = "".join(rng.choice("0123456789") for _ in range(digits))
    city = rng.choice(_CITIES)
    needle = f"The magic number of {city} is {key}.\n"
    question = f"What is the magic number of {city}? The magic number of {city} is"
    return _prompt(tokenizer, iter(haystack), needle, question, key, length, depth)


def _prompt(
    tokenizer: Any,
    lines: Iterator[str],
    needle: str,
    question: str,
    key: str,
    length: int,
    depth: float,
) -> Prompt:
    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    left = length - len(tokenizer(TASK + needle + question + f" {key}", verbose=False)["input_ids"])
    if left < 0:
        raise ValueError(f"--lengths: {length} tokens are too few for the question itself")
    chosen: list[str] = []
    known: dict[str, int] = {}  # passkey's filler is one line, again and again
    for line in lines:
        if line not in known:
            known[line] = count(line)
        left -= known[line]
        if left < 0:
            break
        chosen.append(line)
    else:
        raise ValueError(
            f"the haystack is {left:,} tokens shorter than the {length:,} asked for; give longer "
            "documents with --data, or shorter --lengths"
        )
    while True:  # joined, lines may take a token more than they took alone
        at = round(depth * len(chosen))
        text = TASK + "".join([*chosen[:at], needle, *chosen[at:]]) + question
        prompt = tokenizer(text, verbose=False)["input_ids"]
        ids = tokenizer(f"{text} {key}", verbose=False)["input_ids"]
        if len(ids) <= length:
            break
        chosen = chosen[: -max(1, (len(ids) - length) // (known[chosen[-1]] + 1))]
    shared = next(
        (i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt)
    )
    return Prompt(np.array(ids), len(ids) - shared, depth)


def depths(trials: int, rng: random.Random) -> list[float]:
    """One depth in each of ``trials`` equal parts of the text, by chance within it."""
    return [(trial + rng.random()) / trials for trial in range(trials)]


def haystack_lines(documents: Sequence[Any], tokenizer: Any) -> list[str]:
    """The lines of tokenised documents, one document after the other."""
    text = "\n".join(tokenizer.decode(document.ids) for document in documents)
    return [line + "\n" for line in text.split("\n")]
