"""Short texts of four kinds, so that a search for one kind of text does not harm the others."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longrope.data.documents import Document
from longrope.data.windows import TokenDocument, cut_into_spans, pack, tokenize, with_bos

# In this order, the first two differ most.
KINDS = ("prose", "code", "dialogue", "manual")
# Windows of each kind for validation.
VALIDATION_WINDOWS = 2
# Tokens of half a text with the tokenizers of large models, about; for prices.
TOKENS = 16_384


def windows_of_kinds(
    tokenizer: Any, length: int, original: int, seed: int, bos: Sequence[int]
) -> tuple[dict[str, np.ndarray], dict[str, list[np.ndarray]]]:
    """Cut windows of each kind of text: one for a search, and others for its validation.

    The search's are from the first half of a text, the others from the second. Where a half is
    shorter than a window, the kinds are joined; where all of them are, the window is what there is.

    Args:
        length: tokens of a window.
        original: original length of the model; shorter windows say nothing about an extension.

    Returns:
        A window by kind, and a list of windows by kind: token ids, with BOS in front. Both are
        empty if the texts are too short.
    """
    rng = random.Random(f"{seed} kinds")
    halves = [cut_into_spans(document, 2, 0) for document in kind_documents(tokenizer)]
    first, second = ([pair[i] for pair in halves] for i in (0, 1))
    if min(len(half) for pair in halves for half in pair) < length:
        first, second = ([pack(half, bos, tokenizer.eos_token_id)] for half in (first, second))
    kinds = KINDS if len(first) == len(KINDS) else ("other kinds",)
    size = min(length, *(len(half) for half in (*first, *second)))
    if size < length and size <= original:
        return {}, {}
    searched = {
        kind: next(_cut(half, size, 1, rng, bos)) for kind, half in zip(kinds, first, strict=True)
    }
    validated = {
        kind: list(_cut(half, size, VALIDATION_WINDOWS, rng, bos))
        for kind, half in zip(kinds, second, strict=True)
    }
    return searched, validated


def kind_documents(tokenizer: Any) -> list[TokenDocument]:
    """Tokenize the text of each kind, in the order of :data:`KINDS`."""
    folder = Path(__file__).parent / "kind_texts"
    return tokenize(
        [Document(k, (folder / f"{k}.txt").read_text("utf-8")) for k in KINDS], tokenizer
    )


def _cut(
    document: TokenDocument, size: int, count: int, rng: random.Random, bos: Sequence[int]
) -> Iterator[np.ndarray]:
    """Yield up to ``count`` disjoint windows from random places of a text of one kind."""
    starts = rng.sample(range(len(document) // size), k=min(count, len(document) // size))
    for start in starts:
        yield with_bos(document.ids[start * size :][:size], bos)
