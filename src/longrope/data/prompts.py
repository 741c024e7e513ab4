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
    """One passkey or needle prompt with its answer.

    Args:
        ids: token ids of prompt and answer together, shape (tokens,).
        answer_tokens: tokens of the answer, at the end of ``ids``.
        depth: where the number is hidden, 0 (start) to 1 (end).
    """

    ids: np.ndarray
    answer_tokens: int
    depth: float


def passkey_prompt(
    tokenizer: Any, length: int, depth: float, rng: random.Random, digits: int = 5
) -> Prompt:
    """Return the LongRoPE paper's passkey prompt, as long as fits into ``length`` tokens.

    Args:
        depth: where the number is hidden among the filler lines, 0 (start) to 1 (end).

    Raises:
        ValueError: ``length`` is too short for the question.
    """
    key = "".join(rng.choice("0123456789") for _ in range(digits))
    return _prompt(tokenizer, repeat(FILLER), *_passkey_texts(key), key, length, depth)


def question_tokens(tokenizer: Any, digits: int = 5) -> int:
    """Return how many tokens the shortest passkey or needle prompt takes, answer included."""
    key = "0" * digits
    city = max(_CITIES, key=len)
    kinds = (_passkey_texts(key), _needle_texts(key, city))
    texts = [f"{TASK}{needle}{question} {key}" for needle, question in kinds]
    return max(len(tokenizer(text)["input_ids"]) for text in texts) + digits


def require_room(field: str, tokenizer: Any, length: int) -> None:
    """Check that sequences have room for a passkey or needle prompt.

    Raises:
        ValueError: it does not; names the ``field`` that asks for passkeys.
    """
    shortest = question_tokens(tokenizer)
    if shortest > length:
        raise ValueError(
            f"{field}: a passkey question takes {shortest} tokens, but sequences have {length}; "
            "use longer sequences, or set it to 0"
        )


def needle_prompt(
    tokenizer: Any,
    haystack: Sequence[str],
    length: int,
    depth: float,
    rng: random.Random,
    digits: int = 5,
) -> Prompt:
    """Return a needle prompt, as long as fits: a sentence hidden between lines of a text.

    Args:
        haystack: lines of the text.
        depth: where the sentence is hidden, 0 (start) to 1 (end).

    Raises:
        ValueError: the haystack is shorter than ``length`` tokens, or ``length`` is too short.
    """
    key = "".join(rng.choice("0123456789") for _ in range(digits))
    city = rng.choice(_CITIES)
    return _prompt(tokenizer, iter(haystack), *_needle_texts(key, city), key, length, depth)


def _passkey_texts(key: str) -> tuple[str, str]:
    """Return the texts of a passkey prompt: the paper's sentence that hides it, its question."""
    needle = f"The pass key is {key}. Remember it. {key} is the pass key.\n"
    return needle, "What is the pass key? The pass key is"


def _needle_texts(key: str, city: str) -> tuple[str, str]:
    """Return the texts of a needle prompt: the sentence with a city's number, its question."""
    number = f"magic number of {city}"
    return f"The {number} is {key}.\n", f"What is the {number}? The {number} is"


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

    least = len(tokenizer(TASK + needle + question + f" {key}", verbose=False)["input_ids"])
    left = length - least
    if left < 0:
        raise ValueError(
            f"length is {length}, but the question alone takes {least} tokens; use at least {least}"
        )
    chosen: list[str] = []
    known: dict[str, int] = {}  # the passkey filler repeats one line
    for line in lines:
        if line not in known:
            known[line] = count(line)
        left -= known[line]
        if left < 0:
            break
        chosen.append(line)
    else:
        raise ValueError(
            f"length is {length:,}, but the documents are {left:,} tokens too short to fill it; "
            "give more `data`, or a smaller `length`"
        )
    while True:  # lines may take a token more when joined
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
    """Draw one random prompt depth in each of ``trials`` equal ranges from 0 to 1."""
    return [(trial + rng.random()) / trials for trial in range(trials)]


def haystack_lines(documents: Sequence[Any], tokenizer: Any) -> list[str]:
    """Return the haystack for needle prompts: the lines of tokenized documents, in order."""
    text = "\n".join(tokenizer.decode(document.ids) for document in documents)
    return [line + "\n" for line in text.split("\n")]
