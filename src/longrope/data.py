"""Documents, their tokens, and the windows that searches and evaluations run on."""

import dataclasses
import hashlib
import io
import json
import logging
import os
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longrope.files import write_atomically
from longrope.library import library_texts

log = logging.getLogger(__name__)

_HUB_DATASET = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclasses.dataclass(frozen=True)
class Document:
    """One text; windows never reach over its end."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


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


def read_documents(sources: Sequence[str], field: str = "text") -> list[Document]:
    """Read text files, folders of them, JSONL and Parquet files, or hub datasets.

    ``field`` names the text's field in JSONL, Parquet and datasets. Documents with
    the same text are kept once.

    Raises:
        ValueError: nothing there, not text, no such field, or no text in it.
    """
    documents: dict[str, Document] = {}
    for source in sources:
        found = list(_read(source, field))
        if not found:
            raise ValueError(f"--data {source}: no text in it")
        for document in found:
            documents.setdefault(document.sha256, document)
    return list(documents.values())


def check_sources(sources: Sequence[str]) -> None:
    """Refuse data that is not there, without reading any.

    Raises:
        ValueError: neither a file nor a folder, nor what a hub id looks like.
    """
    for source in sources:
        if not Path(source).exists() and not _is_hub_dataset(source):
            raise ValueError(f"--data {source}: no such file or folder")


def _is_hub_dataset(source: str) -> bool:
    return bool(_HUB_DATASET.fullmatch(source)) and not Path(source).suffix


def library_documents(held_out: bool | None = None) -> list[Document]:
    """The standard library of this Python; see :mod:`longrope.library`."""
    return [Document(name, text) for name, text in library_texts(held_out).items()]


def _read(source: str, field: str) -> Iterable[Document]:
    path = Path(source)
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if f.is_file()]
        for file in files:
            if any(part.startswith(".") for part in file.relative_to(path).parts):
                continue
            try:
                yield from _read_file(file, field)
            except ValueError as error:
                log.warning("left out: %s", error)
    elif path.is_file():
        yield from _read_file(path, field)
    else:
        check_sources([source])
        yield from _read_hub_dataset(source, field)


def _read_file(path: Path, field: str) -> Iterable[Document]:
    if path.suffix == ".parquet":
        yield from _rows(_parquet_rows(path, field), str(path), field)
    elif path.suffix in (".jsonl", ".ndjson"):
        yield from _rows(_json_rows(path), str(path), field)
    else:
        text = _text(path)
        if not text.strip():
            raise ValueError(f"{path}: the document is empty")
        yield Document(path.name, text)


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{path}: not UTF-8 text; longrope reads text, JSONL and Parquet")
    return text


def _json_rows(path: Path) -> Iterable[Any]:
    for number, line in enumerate(_text(path).splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} is not JSON ({error})") from None


def _parquet_rows(path: Path, field: str) -> Iterable[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path}: Parquet needs: pip install 'longrope[parquet]'") from None
    try:
        file = parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: not a Parquet file ({error})") from None
    if field not in file.schema_arrow.names:
        raise _no_field(str(path), field, file.schema_arrow.names)
    for batch in file.iter_batches(columns=[field]):
        yield from batch.to_pylist()


def _read_hub_dataset(source: str, field: str) -> Iterable[Document]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError(
            f"--data {source}: no such file or folder; to read it as a hub dataset: "
            "pip install 'longrope[datasets]'"
        ) from None
    name, _, split = source.partition(":")
    try:
        rows = load_dataset(name, split=split or "train")
    except Exception as error:  # the library raises a dozen kinds
        raise ValueError(f"--data {source}: cannot be read from the hub ({error})") from None
    yield from _rows(rows, source, field)


def _rows(rows: Iterable[Any], where: str, field: str) -> Iterable[Document]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise _no_field(f"{where}: row {number}", field, row if isinstance(row, dict) else ())
        if row[field].strip():
            yield Document(f"{Path(where).name}:{number}", row[field])


def _no_field(where: str, field: str, names: Iterable[str]) -> ValueError:
    return ValueError(
        f"{where}: no text field {field!r}; name it with --field (it has: "
        f"{', '.join(map(str, names)) or 'none'})"
    )


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
    return TokenDocument("packed", hashes, np.concatenate(pieces))


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


def search_windows(
    documents: Sequence[TokenDocument], length: int, samples: int, seed: int, bos: int | None
) -> Windows:
    """Up to ``samples`` disjoint windows, spread over up to half of the usable documents.

    The other half stays unseen, for evaluation. The choice depends on the seed and on
    the texts, not on their order.

    Raises:
        ValueError: no document is long enough.
    """
    usable = sorted(require_length(documents, length), key=lambda document: document.sha256)
    rng = random.Random(seed)
    rng.shuffle(usable)
    chosen = usable[: min(samples, (len(usable) + 1) // 2)]
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


def parse_length(text: str, original: int | None = None) -> int:
    """Tokens from ``131072``, ``128k`` (× 1,024) or, given an original length, ``8x``.

    Raises:
        ValueError: none of these forms.
    """
    number, unit = text.strip().lower(), 1
    if number.endswith("k"):
        number, unit = number[:-1], 1024
    elif number.endswith("x") and original is not None:
        number, unit = number[:-1], original
    try:
        length = float(number) * unit
    except ValueError:
        length = 0.0
    if not 0 < length < 1e12 or length != int(length):
        raise ValueError(f"length {text!r} is not one; write 131072, 128k or 8x")
    return int(length)
