"""Tokenize documents and cut them into windows for searches and evaluations."""

import dataclasses
import hashlib
import logging
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longrope.data.documents import Document, check_sources, read_documents
from longrope.data.encoding import (
    bos_tokens,
    check_ids,
    encode,
    tokenizer_digest,
    without_start,
)
from longrope.files.stores import read_arrays, write_arrays
from longrope.progress import progress

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TokenDocument:
    """A tokenized document, from which windows are cut.

    Args:
        sha256: hash of every text in it (several for packed documents).
        ids: shape (tokens,), int32, without BOS or EOS.
    """

    name: str
    sha256: tuple[str, ...]
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def tokenize(documents: Sequence[Document], tokenizer: Any) -> list[TokenDocument]:
    """Tokenize whole documents in batches, with a cache on disk by content hash.

    The cache is ``$LONGROPE_CACHE``, by default ``~/.cache/longrope``; it has a file per batch.
    Without a home directory, or where it cannot be written, nothing is cached.
    """
    cache, kind = _cache_directory(), tokenizer_digest(tokenizer)
    result: list[TokenDocument] = []
    batches = list(_batches(documents))
    characters = sum(len(document.text) for document in documents)
    with progress("tokenize", len(documents), show=characters >= _SHOWN * _BATCH) as advance:
        for batch in batches:
            key = hashlib.sha256(
                " ".join([_CACHED, kind, *(d.sha256 for d in batch)]).encode()
            ).hexdigest()
            file = cache / f"{key}.safetensors" if cache else None
            rows = _load_ids(file, len(batch)) if file else None
            if rows is None:
                texts, done = [document.text for document in batch], len(result)
                rows = encode(
                    tokenizer, texts, lambda n, done=done: advance(done, f"{n:,} characters more")
                )
                before = bos_tokens(tokenizer)
                rows = [without_start(ids, before) for ids in rows]
                if file and not _save_ids(file, rows):
                    cache = None
            result += [
                TokenDocument(document.name, (document.sha256,), ids)
                for document, ids in zip(batch, rows, strict=True)
            ]
            advance(len(result), "documents")
    return result


_CACHED = "2"  # the form of the cached tokens: without BOS


def _cache_directory() -> Path | None:
    """Return the directory of cached tokens; None where there is no home directory."""
    if given := os.environ.get("LONGROPE_CACHE"):
        return Path(given).expanduser() / "tokens"
    home = os.path.expanduser("~") if os.environ.get("HOME") != "" else ""
    return Path(home, ".cache", "longrope", "tokens") if os.path.isabs(home) else None


# Spans that one document is cut into at most.
MOST_SPANS = 8
# Characters of a batch at most, and full batches from which on a progress bar is shown.
_BATCH, _SHOWN = 1_000_000, 8


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Yield documents in batches of about a million characters; a longer one is alone."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        if batch and characters + len(document.text) > _BATCH:
            yield batch
            batch, characters = [], 0
        batch.append(document)
        characters += len(document.text)
    if batch:
        yield batch


def load_documents(
    tokenizer: Any,
    data: Sequence[str],
    field: str = "text",
) -> list[TokenDocument]:
    """Read documents, and tokenize them to cut windows from.

    ``data`` and ``field`` are as in :func:`longrope.data.documents.read_documents`.

    Raises:
        ValueError: no source, or one that cannot be read.
    """
    check_sources(data)
    return tokenize(read_documents(data, field), tokenizer)


def check_documents(
    documents: Iterable[TokenDocument], vocabulary: int, special: Iterable[int | None] = ()
) -> None:
    """Check that a model has an embedding for every token of documents and for special tokens.

    Raises:
        ValueError: it has not; names the document and the id.
    """
    for document in documents:
        check_ids(document.ids, vocabulary, document.name)
    used = [token for token in special if token is not None]
    check_ids(np.array(used), vocabulary, "BOS or EOS of the tokenizer")


def _load_ids(file: Path, documents: int) -> list[np.ndarray] | None:
    """Read the token ids of a batch from the cache; None where it has none, or damaged ones."""
    found = read_arrays(file)
    if found is None or len(found["lengths"]) != documents:
        return None
    return np.split(found["ids"], np.cumsum(found["lengths"])[:-1])


def _save_ids(file: Path, rows: Sequence[np.ndarray]) -> bool:
    """Write the token ids of a batch to the cache; warn, and return False, where that fails."""
    lengths = np.array([len(ids) for ids in rows], dtype=np.int64)
    ids = np.concatenate(rows) if len(rows) > 1 else rows[0]
    try:
        write_arrays(file, {"ids": ids, "lengths": lengths})
    except ValueError:
        log.warning(
            "tokens are not cached: %s cannot be written; set LONGROPE_CACHE to a directory with "
            "free space",
            file.parent,
        )
        return False
    return True


def pack(documents: Sequence[TokenDocument], bos: Sequence[int], eos: int | None) -> TokenDocument:
    """Pack tokenized documents into one, each between BOS and EOS."""
    packed = []
    for document in documents:
        end = [] if eos is None else [eos]
        packed.append(np.concatenate([bos, document.ids, end]).astype(np.int32))
    hashes = tuple(h for document in documents for h in document.sha256)
    name = "+".join(document.name for document in documents[:3])
    more = f" and {len(documents) - 3} more" if len(documents) > 3 else ""
    return TokenDocument(name + more, hashes, np.concatenate(packed))


def join_short_documents(
    documents: Sequence[TokenDocument], length: int, bos: Sequence[int], eos: int | None
) -> list[TokenDocument]:
    """Pack short tokenized documents together, so that each has at least ``length`` tokens.

    Long documents are returned as they are. A remainder that is too short is dropped.
    """
    result = [document for document in documents if len(document) >= length]
    short: list[TokenDocument] = []
    tokens, around = 0, len(bos) + (eos is not None)
    for document in documents:
        if len(document) < length:
            short.append(document)
            tokens += len(document) + around
            if tokens >= length:
                result.append(pack(short, bos, eos))
                short, tokens = [], 0
    return result


def warn_of_short(documents: Sequence[TokenDocument], length: int) -> None:
    """Say how many tokenized documents are left out, because they hold no window of a length."""
    short = sum(len(document) < length for document in documents)
    if 0 < short < len(documents):
        log.warning(
            "%s of %s documents have fewer than %s tokens and are left out; --pack (pack=True) "
            "joins them",
            *(f"{number:,}" for number in (short, len(documents), length)),
        )


def require_length(documents: Sequence[TokenDocument], length: int) -> list[TokenDocument]:
    """Return the tokenized documents that hold a window of ``length`` tokens.

    Raises:
        ValueError: there is none; states the tokens available and the remedy.
    """
    long_enough = [document for document in documents if len(document) >= length]
    if not long_enough:
        longest = max((len(document) for document in documents), default=0)
        total = sum(map(len, documents))
        raise ValueError(
            f"too few tokens: one document must have {length:,}, but the longest of "
            f"{len(documents)} has {longest:,} ({total:,} in all); give longer documents as "
            "`data`, join them with pack=True, or use a smaller length"
        )
    return long_enough


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of one length and the documents that they were cut from.

    Args:
        ids: token ids, shape (windows, length), or length + 1 with a BOS in front.
        documents: the documents that they and the validation windows were cut from.
        validation: token ids of validation windows, of the same length; it may be empty.
    """

    ids: np.ndarray
    documents: tuple[TokenDocument, ...]
    validation: np.ndarray


def random_half(documents: Sequence[TokenDocument], rng: random.Random) -> list[TokenDocument]:
    """Return a random half of tokenized documents, rounded up, independent of their order."""
    return _shuffled(documents, rng)[: (len(documents) + 1) // 2]


def _shuffled(documents: Sequence[TokenDocument], rng: random.Random) -> list[TokenDocument]:
    shuffled = sorted(documents, key=lambda document: document.sha256)
    rng.shuffle(shuffled)
    return shuffled


def search_windows(
    documents: Sequence[TokenDocument],
    length: int,
    samples: int,
    seed: int,
    bos: Sequence[int],
    *,
    validation: int = 0,
    spare_half: bool = True,
) -> Windows:
    """Cut up to ``samples`` disjoint search windows from up to half of the documents.

    Validation windows are cut from other documents of that half, or else from other places. The
    only document is cut in two, if it is long enough, and searched on in its first half.

    The choice depends on the seed and on the texts, not on their order.

    Args:
        length: tokens per window.
        samples: windows at most.
        bos: ids of the special tokens before each window, as of ``bos_tokens``.
        validation: validation windows at most; a third of all windows where these are few.
        spare_half: hold out the other half for evaluation; False uses all documents.

    Raises:
        ValueError: no document is long enough.
    """
    usable = require_length(documents, length)
    warn_of_short(documents, length)
    rng = random.Random(seed)
    chosen = _shuffled(usable, rng)
    if spare_half:
        chosen = chosen[: (len(usable) + 1) // 2]
        if len(usable) == 1 and len(usable[0].sha256) == 1:
            chosen = _first_half(usable[0], length)
    searched, others = chosen[:samples], chosen[samples : samples + validation]
    pieces = list(_pieces(searched, length, rng))
    unseen = [*_pieces(others, length, rng), *pieces[samples:]]
    pieces = pieces[:samples]
    if (few := validation - len(unseen)) > 0:  # too little text for all: a third is held out
        held = min(few, len(pieces) // 3)
        unseen += pieces[len(pieces) - held :]
        pieces = pieces[: len(pieces) - held]
    if len(pieces) < samples:
        log.warning("found only %d of %d windows of %d tokens", len(pieces), samples, length)
    unseen = unseen[:validation]
    used = {id(document) for document, _ in (*pieces, *unseen)}
    rows = [
        np.stack([with_bos(document.ids[start:][:length], bos) for document, start in part])
        if part
        else np.empty((0, length + len(bos)), dtype=np.int32)
        for part in (pieces, unseen)
    ]
    return Windows(rows[0], tuple(d for d in chosen if id(d) in used), rows[1])


def _pieces(
    documents: Sequence[TokenDocument], length: int, rng: random.Random
) -> Iterator[tuple[TokenDocument, int]]:
    """Yield disjoint pieces of tokenized documents in random order, one of each in turn."""
    starts = [[i * length for i in range(len(document) // length)] for document in documents]
    for each in starts:
        rng.shuffle(each)
    while any(starts):
        for document, each in zip(documents, starts, strict=True):
            if each:
                yield document, each.pop()


def _first_half(document: TokenDocument, length: int) -> list[TokenDocument]:
    """Return the first half of the only document for a search, or all of it if it is short."""
    if len(document) < 3 * length:
        log.warning(
            "%s is the only document and is searched on: give compare another one", document.name
        )
        return [document]
    log.warning(
        "%s is the only document: its first half is searched on, and compare uses the second",
        document.name,
    )
    return [_halves(document, length)[0]]


def _halves(document: TokenDocument, gap: int) -> tuple[TokenDocument, TokenDocument]:
    """Return the halves of a document: the first for a search, the second for comparisons.

    Their hashes are not those of the spans that an extension searches and trains on.
    """
    halves = []
    for span, which in zip(cut_into_spans(document, 2, gap), ("first", "second"), strict=True):
        own = hashlib.sha256(f"{document.sha256} {which} half".encode()).hexdigest()
        name = f"{document.name} ({which} half)"
        halves.append(TokenDocument(name, (*document.sha256, own), span.ids))
    return halves[0], halves[1]


def with_bos(ids: np.ndarray, bos: Sequence[int]) -> np.ndarray:
    """Return a window's token ids with BOS tokens in front."""
    return np.concatenate([bos, ids]).astype(ids.dtype)


def exclude_documents(
    documents: Sequence[TokenDocument], hashes: Iterable[str]
) -> list[TokenDocument]:
    """Return the tokenized documents that contain no text with one of these hashes."""
    seen = set(hashes)
    return [document for document in documents if not seen & set(document.sha256)]


def cut_into_spans(document: TokenDocument, spans: int, gap: int) -> list[TokenDocument]:
    """Cut a tokenized document into equal spans with ``gap`` unused tokens between neighbours.

    A span has the hash of its document too, so that comparisons leave out the whole document where
    a span was searched on.
    """
    each = (len(document) - gap * (spans - 1)) // spans
    found = []
    for number in range(spans):
        ids = document.ids[number * (each + gap) :][:each]
        own = hashlib.sha256(f"{document.sha256} span {number} of {spans}".encode()).hexdigest()
        name = f"{document.name} ({number + 1} of {spans})"
        found.append(TokenDocument(name, (*document.sha256, own), ids))
    return found


def unsearched_half(
    document: TokenDocument, hashes: Iterable[str], gap: int
) -> TokenDocument | None:
    """Return the half of a tokenized document that a search spared, or None if it used all of it.

    Args:
        hashes: of what was searched on.
        gap: unused tokens between the halves, the target length of that search.
    """
    first, second = _halves(document, gap)
    return second if first.sha256[-1] in set(hashes) else None
