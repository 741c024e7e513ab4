"""Documents as tokens, and the windows that searches and evaluations run on."""

import dataclasses
import hashlib
import io
import json
import logging
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longrope.data.documents import Document, library_documents, read_documents
from longrope.files import write_atomically

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TokenDocument:
    """A document as token ids, shape (tokens,), int32, without BOS or EOS.

    ``sha256`` holds the hash of every text in it (several when packed).
    """

    name: str
    sha256: tuple[str, ...]
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def bos_token(tokenizer: Any) -> int | None:
    """The BOS id where the tokenizer puts one before a text, else None."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return bos if bos is not None and ids and ids[0] == bos else None


def tokenize(documents: Sequence[Document], tokenizer: Any) -> list[TokenDocument]:
    """Token ids of whole documents, cached on disk by the content's hash.

    The cache is ``$LONGROPE_CACHE``, by default ``~/.cache/longrope``.
    """
    cache = Path(os.environ.get("LONGROPE_CACHE", Path.home() / ".cache" / "longrope")) / "tokens"
    kind = _tokenizer_digest(tokenizer)
    result = []
    for document in documents:
        key = hashlib.sha256(f"{kind} {document.sha256}".encode()).hexdigest()
        file = cache / f"{key}.npy"
        ids = _load_ids(file)
        if ids is None:
            encoded = tokenizer(document.text, add_special_tokens=False, verbose=False)
            ids = np.asarray(encoded["input_ids"], dtype=np.int32)
            buffer = io.BytesIO()
            np.save(buffer, ids)
            try:
                write_atomically(file, buffer.getvalue())
            except ValueError as error:
                log.warning("tokens are not cached: %s", error)
        result.append(TokenDocument(document.name, (document.sha256,), ids))
    return result


def load_documents(
    tokenizer: Any,
    data: Sequence[str],
    *,
    field: str = "text",
    held_out: bool,
) -> list[TokenDocument]:
    """Tokens of the documents given, or of the Python library where none are.

    Of the library, ``held_out`` chooses the packages that the bundled model never saw.
    """
    documents = read_documents(data, field) if data else library_documents(held_out)
    return tokenize(documents, tokenizer)


def _load_ids(file: Path) -> np.ndarray | None:
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    kind = f"{type(tokenizer).__name__} {described}"
    return hashlib.sha256(kind.encode()).hexdigest()


def pack(documents: Sequence[TokenDocument], bos: int | None, eos: int | None) -> TokenDocument:
    """All documents in one, each between BOS and EOS, for windows that may join them."""
    pieces = []
    for document in documents:
        start = [] if bos is None else [bos]
        end = [] if eos is None else [eos]
        pieces.append(np.concatenate([start, document.ids, end]).astype(np.int32))
    hashes = tuple(h for document in documents for h in document.sha256)
    name = "+".join(document.name for document in documents[:3])
    more = f" and {len(documents) - 3} more" if len(documents) > 3 else ""
    return TokenDocument(name + more, hashes, np.concatenate(pieces))


def joined(
    documents: Sequence[TokenDocument], length: int, bos: int | None, eos: int | None
) -> list[TokenDocument]:
    """Documents of at least ``length`` tokens: long ones alone, short ones packed together.

    What is left over at the end and too short goes to none.
    """
    result = [document for document in documents if len(document) >= length]
    waiting: list[TokenDocument] = []
    tokens, around = 0, (bos is not None) + (eos is not None)
    for document in documents:
        if len(document) < length:
            waiting.append(document)
            tokens += len(document) + around
            if tokens >= length:
                result.append(pack(waiting, bos, eos))
                waiting, tokens = [], 0
    return result


def require_length(documents: Sequence[TokenDocument], length: int) -> list[TokenDocument]:
    """The documents with at least ``length`` tokens.

    Raises:
        ValueError: there is none; says how many tokens there are and what to do.
    """
    long_enough = [document for document in documents if len(document) >= length]
    if not long_enough:
        longest = max((len(document) for document in documents), default=0)
        total = sum(map(len, documents))
        raise ValueError(
            f"too few tokens: the longest of {len(documents)} documents has {longest:,} and "
            f"{length:,} are needed in one ({total:,} in all); give longer documents with --data, "
            "join them with --pack, or choose a shorter length"
        )
    return long_enough


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of one length and the documents that they were cut from.

    ``ids`` has shape (windows, length), or length + 1 with a BOS in front.
    """

    ids: np.ndarray
    documents: tuple[TokenDocument, ...]


def half(documents: Sequence[TokenDocument], rng: random.Random) -> list[TokenDocument]:
    """Half of the documents (one of one), chosen by chance and the texts, not their order."""
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
    bos: int | None,
    *,
    spare_half: bool = True,
) -> Windows:
    """Up to ``samples`` disjoint windows, spread over up to half of the usable documents.

    The other half stays unseen, for evaluation; without ``spare_half`` all are used. The
    choice depends on the seed and on the texts, not on their order.

    Raises:
        ValueError: no document is long enough.
    """
    usable = require_length(documents, length)
    rng = random.Random(seed)
    chosen = _shuffled(usable, rng)
    if spare_half:
        chosen = chosen[: (len(usable) + 1) // 2]
        if len(usable) == 1 and len(usable[0].sha256) == 1:
            log.warning(
                "%s is searched on, and no other document is left to evaluate on", usable[0].name
            )
    chosen = chosen[:samples]
    starts = {}
    for document in chosen:
        starts[document.sha256] = [i * length for i in range(len(document) // length)]
        rng.shuffle(starts[document.sha256])
    rows: list[np.ndarray] = []
    while len(rows) < samples and any(starts.values()):
        for document in chosen:
            if starts[document.sha256] and len(rows) < samples:
                start = starts[document.sha256].pop()
                rows.append(with_bos(document.ids[start : start + length], bos))
    if len(rows) < samples:
        log.warning("only %d windows of %d tokens, of %d asked for", len(rows), length, samples)
    return Windows(np.stack(rows), tuple(chosen))


def with_bos(ids: np.ndarray, bos: int | None) -> np.ndarray:
    return ids if bos is None else np.concatenate([[bos], ids]).astype(ids.dtype)


def unseen(documents: Sequence[TokenDocument], hashes: Iterable[str]) -> list[TokenDocument]:
    """The documents of which no text is among ``hashes``."""
    seen = set(hashes)
    return [document for document in documents if not seen & set(document.sha256)]
