"""Read documents from text, JSON, JSONL and Parquet files, directories and hub datasets."""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from longrope.data.stdlib import SOURCES, library_texts
from longrope.progress import announced

log = logging.getLogger(__name__)

_FILES = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".parquet", ".csv")
_HUB_DATASET = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclasses.dataclass(frozen=True)
class Document:
    """A document: one named text, whose end no window crosses."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Hash of the document's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_documents(sources: Sequence[str], field: str = "text") -> list[Document]:
    """Read documents from files, directories of files, or hub datasets.

    Documents with the same text are read once.

    Args:
        sources: paths of text, JSON, JSONL, CSV or Parquet files, of directories, ids of datasets,
            or ``python-library`` and ``python-library-held-out``, the library of this Python.
        field: name of the text field in JSON, JSONL, Parquet and datasets.

    Raises:
        ValueError: a missing source, a file that is not text, a missing field, or no text.
    """
    documents: dict[str, Document] = {}
    for source in sources:
        with announced(f"reading {Path(source).name or source}"):
            found = list(_read(source, field))
        if not found:
            raise ValueError(f"data={source!r} contains no text; give documents with text")
        for document in found:
            documents.setdefault(document.sha256, document)
    return list(documents.values())


def documents_of(texts: Any, field: str = "text") -> list[Document]:
    """Return documents from texts in memory, or from files.

    Args:
        texts: one path or several, a list of strings (each is one document), or a
            ``datasets.Dataset`` with a text ``field``.

    Raises:
        ValueError: no text, or a string in the list that is the path of a file.
    """
    if isinstance(texts, str) and ("\n" in texts or len(texts) > 1024):
        raise ValueError("texts is a string, which is taken as a path; give a list of strings")
    if isinstance(texts, str | Path):
        return read_documents([str(texts)], field)
    if hasattr(texts, "column_names"):
        return list(_rows(texts, "texts", field))
    items = list(texts)
    if items and all(isinstance(item, Path) for item in items):
        return read_documents([str(item) for item in items], field)
    documents = []
    for number, item in enumerate(items):
        if not isinstance(item, str):
            raise ValueError(f"texts[{number}] is a {type(item).__name__}; give strings or paths")
        if item.strip() and os.path.exists(item):  # False too for what cannot be a path
            raise ValueError(
                f"texts[{number}] is {item!r}, the path of a file: give pathlib.Path(…) to read it"
            )
        if item.strip():
            documents.append(Document(f"texts[{number}]", item))
    if not documents:
        raise ValueError("texts is empty; give documents with text")
    return documents


def check_sources(sources: Sequence[str], name: str = "data") -> None:
    """Check that there are sources of documents and that each exists, without reading it.

    Raises:
        ValueError: no source, or one that is neither a file, nor a directory, nor a hub id.
    """
    if not sources:
        raise ValueError(
            f"{name} is missing; give text files, a directory, a dataset, or python-library for a "
            "first try"
        )
    for source in sources:
        known = source in SOURCES or Path(source).exists()
        if not known and not _is_hub_dataset(source):
            raise ValueError(f"{name}={source!r}: no such file or directory")


def _is_hub_dataset(source: str) -> bool:
    return bool(_HUB_DATASET.fullmatch(source)) and Path(source).suffix not in _FILES


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
                log.warning("skipped: %s", error)
    elif path.is_file():
        yield from _read_file(path, field)
    elif source in SOURCES:
        texts = library_texts(SOURCES[source])
        yield from (Document(name, text) for name, text in texts.items())
    else:
        check_sources([source])
        yield from _read_hub_dataset(source, field)


def _read_file(path: Path, field: str) -> Iterable[Document]:
    if path.suffix == ".parquet":
        yield from _rows(_parquet_rows(path, field), str(path), field)
    elif path.suffix in (".jsonl", ".ndjson", ".json"):
        yield from _rows(_json_rows(path), str(path), field)
    elif path.suffix == ".csv":
        yield from _rows(_csv_rows(path), str(path), field)
    else:
        text = read_text(path)
        if not text.strip():
            raise ValueError(f"{path} is empty; give a document with text")
        yield Document(path.name, text)


def read_text(path: Path) -> str:
    """Read a document or prompt from a UTF-8 text file.

    Raises:
        ValueError: a file that cannot be read, or is not text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{path} is not UTF-8 text; give text, JSON, JSONL, CSV or Parquet files")
    return text


def _json_rows(path: Path) -> Iterable[Any]:
    """Yield the rows of a JSON or JSONL file of documents.

    A ``.json`` file may hold JSON lines, one list or one object.
    """
    content = read_text(path)
    if path.suffix == ".json":
        with contextlib.suppress(json.JSONDecodeError):
            whole = json.loads(content)
            yield from whole if isinstance(whole, list) else [whole]
            return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} is not valid JSON ({error})") from None


def _csv_rows(path: Path) -> Iterable[Any]:
    """Yield the rows of a CSV file with a header line, as objects."""
    csv.field_size_limit(2**31 - 1)  # a field may be a whole book
    try:
        yield from csv.DictReader(io.StringIO(read_text(path), newline=""))
    except csv.Error as error:
        raise ValueError(f"{path} is not valid CSV ({error})") from None


def _parquet_rows(path: Path, field: str) -> Iterable[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{path}: Parquet requires pyarrow: pip install 'longrope[parquet]'"
        ) from None
    try:
        file = parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is not a Parquet file ({error})") from None
    if field not in file.schema_arrow.names:
        raise _no_field(str(path), field, file.schema_arrow.names)
    for batch in file.iter_batches(columns=[field]):
        yield from batch.to_pylist()


def _read_hub_dataset(source: str, field: str) -> Iterable[Document]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError(
            f"data={source!r}: no such file or directory; to read it as a dataset of the hub: "
            "pip install 'longrope[datasets]'"
        ) from None
    from longrope.errors import first_line
    from longrope.progress import quiet  # it imports transformers

    name, _, split = source.partition(":")
    try:
        with quiet():
            rows = load_dataset(name, split=split or "train")
    except Exception as error:  # the library raises a dozen types
        raise ValueError(
            f"data={source!r}: no such file or directory, and the hub has no readable dataset of "
            f"this name ({first_line(error)})"
        ) from None
    yield from _rows(rows, source, field)


def _rows(rows: Iterable[Any], where: str, field: str) -> Iterable[Document]:
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict) and field in row and row[field] is None:
            continue
        if not isinstance(row, dict):
            raise ValueError(
                f"{where}: row {number} is not an object; every row must have a field {field!r}"
            )
        if field not in row:
            raise _no_field(f"{where}: row {number}", field, row)
        if not isinstance(row[field], str):
            raise ValueError(
                f"{where}: row {number} has {type(row[field]).__name__} in the field {field!r}; "
                "set `field` to a field that holds text"
            )
        # JSON can hold half of a surrogate pair, which no tokenizer accepts.
        text = row[field].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if text.strip():
            yield Document(f"{Path(where).name}:{number}", text)


def _no_field(where: str, field: str, names: Iterable[str]) -> ValueError:
    return ValueError(
        f"{where} has no field {field!r}; set `field` to the one that holds the text (it has: "
        f"{', '.join(map(str, names)) or 'no fields'})"
    )
