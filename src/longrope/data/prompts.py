"""Passkey and needle prompts of an exact length."""

import dataclasses
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any

import numpy as np

from longrope.data.encoding import encode, encode_prompt
from longrope.data.windows import TokenDocument

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
    """Return the LongRoPE paper's passkey prompt of ``length`` tokens.

    Args:
        depth: where the number is hidden among the filler lines, 0 (start) to 1 (end).

    Raises:
        ValueError: ``length`` is too short for the question, or not reached within 1%.
    """
    key = "".join(rng.choice("0123456789") for _ in range(digits))
    return _prompt(tokenizer, repeat(FILLER), *_passkey_texts(key), key, length, depth)


def question_tokens(tokenizer: Any, digits: int = 5) -> int:
    """Return how many tokens any passkey or needle prompt has room in, answer included."""
    order = "0918273645" * (digits // 10 + 2)
    texts = []
    for key in (order[start : start + digits] for start in range(10)):
        kinds = (_passkey_texts(key), *(_needle_texts(key, city) for city in _CITIES))
        texts += [f"{TASK}{needle}{question} {key}" for needle, question in kinds]
    before = len(encode_prompt(tokenizer, TASK)) - len(encode(tokenizer, [TASK])[0])
    return max(map(len, encode(tokenizer, texts))) + before + digits


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
    """Return a needle prompt of ``length`` tokens: a sentence hidden between lines of a text.

    Args:
        haystack: lines of the text.
        depth: where the sentence is hidden, 0 (start) to 1 (end).

    Raises:
        ValueError: the haystack is shorter than ``length`` tokens, or ``length`` is too short or
            not reached within 1%.
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
    """Return a prompt of ``length`` tokens: whole lines of filler, and a part of the next."""

    def build(filler: Sequence[str]) -> str:
        at = round(depth * len(filler))
        return TASK + "".join([*filler[:at], needle, *filler[at:]]) + question

    def room(filler: Sequence[str]) -> int:
        return length - len(encode_prompt(tokenizer, f"{build(filler)} {key}"))

    filler: list[str] = []
    left = room(filler)
    if left < 0:
        raise ValueError(
            f"length is {length}, but the question alone takes {length - left} tokens; use at "
            f"least {length - left}"
        )
    count = _Counts(tokenizer)
    while left > 0:
        if not (more := count.take(lines, left)):
            raise ValueError(
                f"length is {length:,}, but the documents are {left:,} tokens too short to fill "
                "it; give more `data`, or a smaller `length`"
            )
        filler += more
        left = room(filler)  # joined lines may take other numbers of tokens
    rest: list[str] = []
    while filler and left < _CUT_TOKENS:
        back = count.take(reversed(filler), _CUT_TOKENS - left)
        filler, rest = filler[: -len(back)], back[::-1] + rest
        left = room(filler)
    part = _part("".join(rest), left, count, lambda line: room([*filler, line]))
    left = room(filler := [*filler, part])
    if 100 * left > length:
        raise ValueError(
            f"length is {length:,}, but the nearest prompt has {length - left:,} tokens; use a "
            "longer `length`"
        )
    prompt = encode_prompt(tokenizer, build(filler))
    ids = encode_prompt(tokenizer, f"{build(filler)} {key}")
    shared = next(
        (i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt)
    )
    return Prompt(np.array(ids), len(ids) - shared, depth)


# Tokens of filler, at least, and characters, at most, that a part of a line is cut from.
_CUT_TOKENS, _CUT_CHARACTERS = 8, 1000
_ATTEMPTS = 8  # parts of a line that are tried


class _Counts:
    """Tokens of lines, each counted once, as the passkey's filler repeats one line."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._known: dict[str, int] = {}

    def __call__(self, line: str) -> int:
        if line not in self._known:
            self.count([line])
        return self._known[line]

    def count(self, lines: Sequence[str]) -> None:
        """Count the tokens of many lines together, which is faster."""
        counted = [len(ids) for ids in encode(self._tokenizer, lines)]
        self._known.update(zip(lines, counted, strict=True))

    def take(self, lines: Iterable[str], tokens: int) -> list[str]:
        """Take lines until they have ``tokens`` tokens, counted one by one, or end."""
        taken: list[str] = []
        for line in lines:
            taken.append(line)
            tokens -= self(line)
            if tokens <= 0:
                break
        return taken


def _part(text: str, tokens: int, count: _Counts, room: Callable[[str], int]) -> str:
    """Cut a line of ``tokens`` tokens off a text, at the end of a word where that is possible.

    Args:
        room: returns how many tokens a line leaves in the whole prompt, where it may take others
            than alone.

    Returns:
        The line that leaves the fewest tokens; it may be empty.
    """
    text = text[:_CUT_CHARACTERS]
    ends = sorted(range(len(text) + 1), key=lambda end: text[end - 1 : end + 1].isalnum())
    cut = list(dict.fromkeys(text[:end].rstrip() + "\n" for end in ends))
    count.count(cut)
    best, least, wanted = "", tokens, tokens

    def attempt(part: str) -> int:
        nonlocal best, least
        left = room(part)
        if 0 <= left < least:
            best, least = part, left
        return left

    for _ in range(_ATTEMPTS):
        part = max((part for part in cut if count(part) <= wanted), key=count, default=None)
        if part is None or not least:
            break
        cut.remove(part)
        wanted = count(part) + attempt(part)
    # Where no part fits: words that take a token each.
    word, missing = best.removesuffix("\n"), least
    for number in (missing, missing + 1, missing - 1):
        if least:
            attempt(f"{word}{' a' * number}\n")
    return best


def depths(trials: int, rng: random.Random) -> list[float]:
    """Draw one random prompt depth in each of ``trials`` equal ranges from 0 to 1."""
    return [(trial + rng.random()) / trials for trial in range(trials)]


def haystack_lines(documents: Sequence[TokenDocument], tokenizer: Any, tokens: int) -> list[str]:
    """Return the haystack for needle prompts: lines of tokenized documents, in order.

    Long lines are wrapped, so that a needle can stand anywhere.

    Args:
        tokens: of the longest prompt; no more text than it needs is returned.
    """
    lines: list[str] = []
    left = 2 * tokens  # wrapped lines may take fewer tokens than the text
    for document in documents:
        for line in tokenizer.decode(document.ids[:left]).split("\n"):
            parts = map("".join, _PARTS.findall(line)) if len(line) > _LINE else [line]
            lines += [part + "\n" for part in parts]
        left -= len(document)
        if left <= 0:
            break
    return lines


# Characters in a line of the haystack at most, and the parts that longer ones are wrapped into.
_LINE = 200
_PARTS = re.compile(r"(.{1,200})(?:\s|$)|(.{1,200})")
