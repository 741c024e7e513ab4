"""Encode texts as token ids: prompts with BOS, documents in bounded memory, ids in range."""

import hashlib
import importlib.metadata
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longrope.version import __version__

# Characters: of a piece of a long text at least, and of pieces that are encoded together at most.
# A tokenizer takes some 200 times the text that it is given in memory.
_PIECE, _TOGETHER = 50_000, 200_000
# Characters on both sides of a cut that decide its tokens.
_CONTEXT = 200
# Where tokenizers split a text themselves: between lines, or before a space or punctuation mark.
_CUTS = re.compile(r"(?<=\S\n)(?=\w)"), re.compile(r"(?<=\w)(?=[^\w\n])")
_TRIED = 8  # cuts of a kind, before the piece is made longer


def bos_tokens(tokenizer: Any) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text: BOS, two (GLM), or none."""
    whole, bare = tokenizer("a")["input_ids"], _ids(tokenizer, "a")
    starts = range(len(whole) - len(bare) + 1)
    return whole[: next((i for i in starts if whole[i : i + len(bare)] == bare), 0)]


def without_start(ids: np.ndarray, before: list[int]) -> np.ndarray:
    """Return a document's token ids without the :func:`bos_tokens` that it begins with.

    A chat template may have written them into the text.
    """
    while before and ids[: len(before)].tolist() == before:
        ids = ids[len(before) :]
    return ids


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Encode a prompt: with BOS in front if the tokenizer adds it, and never with EOS behind.

    A text that begins with BOS gets no second one.
    """
    before, ids = bos_tokens(tokenizer), encode(tokenizer, [text])[0].tolist()
    return ids if before and ids[: len(before)] == before else before + ids


def encode(
    tokenizer: Any, texts: Sequence[str], advance: Callable[[int], None] = lambda characters: None
) -> list[np.ndarray]:
    """Encode texts without special tokens, long ones by pieces that give the tokens of the whole.

    Args:
        advance: is called with the number of characters encoded so far.

    Returns:
        Token ids of each text, shape (tokens,), int32.
    """
    found: list[list[np.ndarray]] = [[] for _ in texts]
    group: list[tuple[int, str, str]] = []
    characters = waiting = 0
    for number, lead, piece in _pieces(tokenizer, texts):
        if group and waiting + len(piece) > _TOGETHER:
            _encode_group(tokenizer, group, found)
            advance(characters)
            group, waiting = [], 0
        group.append((number, lead, piece))
        characters, waiting = characters + len(piece), waiting + len(piece)
    if group:
        _encode_group(tokenizer, group, found)
    return [np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in found]


def check_ids(ids: Any, vocabulary: int, where: str) -> None:
    """Check that a model has an embedding for every token id.

    Args:
        ids: an array or tensor of ids.
        vocabulary: rows of the model's embeddings.
        where: what has the ids, for the message.

    Raises:
        ValueError: an id is negative or too large; names it.
    """
    for found in (int(ids.min()), int(ids.max())) if math.prod(ids.shape) else ():
        if not 0 <= found < vocabulary:
            raise ValueError(
                f"{where}: token id {found:,} is outside the model's embeddings of "
                f"{vocabulary:,} tokens; leave out the text of that token, such as <pad>, or give "
                "the tokenizer of this model"
            )


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a hash of all that decides a text's tokens: the tokenizer and its libraries."""
    libraries = [importlib.metadata.version(name) for name in ("transformers", "tokenizers")]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        described, content = backend.to_str(), b""
    else:
        added = {str(i): repr(token) for i, token in tokenizer.added_tokens_decoder.items()}
        described = json.dumps([tokenizer.get_vocab(), added], sort_keys=True)
        file = Path(getattr(tokenizer, "vocab_file", None) or "")
        content = file.read_bytes() if file.is_file() else b""
    split = getattr(tokenizer, "split_special_tokens", False)
    kind = [__version__, *libraries, type(tokenizer).__name__, str(split), described]
    return hashlib.sha256("\n".join(kind).encode() + content).hexdigest()


def _ids(tokenizer: Any, texts: Any) -> Any:
    """Return the token ids of one text or of several, without special tokens."""
    return tokenizer(
        texts,
        add_special_tokens=False,
        verbose=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]


def _encode_group(
    tokenizer: Any, group: Sequence[tuple[int, str, str]], found: list[list[np.ndarray]]
) -> None:
    rows = _ids(tokenizer, [lead + piece for _, lead, piece in group])
    for (number, lead, _), ids in zip(group, rows, strict=True):
        skipped = len(_ids(tokenizer, lead)) if lead else 0
        found[number].append(np.asarray(ids[skipped:], dtype=np.int32))


def _pieces(tokenizer: Any, texts: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Cut texts into pieces: yield the text's number, the character before the piece, the piece.

    The character is encoded with the piece, whose first token may depend on it.
    """
    for number, text in enumerate(texts):
        start = 0
        while start < len(text) or not start:
            end = _cut(tokenizer, text, start + _PIECE)
            yield number, text[max(0, start - 1) : start], text[start:end]
            start = max(end, 1)


def _cut(tokenizer: Any, text: str, first: int) -> int:
    """Return the first place from ``first`` on where a cut leaves the tokens as they are."""
    while first + _CONTEXT < len(text):
        for cuts in _CUTS:
            places = cuts.finditer(text, first, min(first + _PIECE, len(text) - _CONTEXT))
            for _, place in zip(range(_TRIED), places, strict=False):
                if _keeps_tokens(tokenizer, text, place.start()):
                    return place.start()
        first += _PIECE
    return len(text)


def _keeps_tokens(tokenizer: Any, text: str, cut: int) -> bool:
    left, right = text[cut - _CONTEXT : cut], text[cut : cut + _CONTEXT]
    whole, before, lead, after = _ids(tokenizer, [left + right, left, left[-1], left[-1] + right])
    return after[: len(lead)] == lead and whole == before + after[len(lead) :]
