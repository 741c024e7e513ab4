"""Read documents from text, JSON, JSONL, CSV, TSV and Parquet files, directories, hub datasets.

A file is read as a whole or not at all: one damaged row refuses it, and in a directory leaves it
out with a warning.
"""

import contextlib
import csv
import dataclasses
import functools
import hashlib
import importlib
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longrope.data.stdlib import SOURCES, library_texts
from longrope.errors import first_line
from longrope.files.parse import refuse_lfs_pointer
from longrope.progress import announced

log = logging.getLogger(__name__)

_FILES_OF_ROWS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
_FILES = (".txt", ".md", *_FILES_OF_ROWS)
_TABLES = {".csv": ",", ".tsv": "\t"}  # and their delimiters
# How compressed files begin.
_COMPRESSED = {
    "gzip": b"\x1f\x8b",
    "zstd": b"\x28\xb5\x2f\xfd",
    "xz": b"\xfd7zXZ",
    "bzip2": b"BZh",
    "zip": b"PK\x03\x04",
}
_ABOUT = ("README", "LICENSE", "LICENCE")  # in a dataset, these are about its rows
_HUB_DATASET = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclasses.dataclass(frozen=True)
class Document:
    """A document: one named text, whose end no window crosses."""

    name: str
    text: str

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the document's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_documents(sources: Sequence[str], field: str = "text") -> list[Document]:
    """Read documents from files, directories of files, or hub datasets.

    Documents with the same text are read once.

    Args:
        sources: paths of text, JSON, JSONL, CSV, TSV or Parquet files, of directories, ids of
            datasets, or ``python-library`` and ``python-library-held-out``, of this Python.
        field: name of the text field in JSON, JSONL, CSV, TSV, Parquet and datasets.

    Raises:
        ValueError: a missing source, a file that is not text, a missing field, or no text.
    """
    documents: list[Document] = []
    for source in sources:
        with announced(f"reading {Path(source).name or source}"):
            found = list(_read(source, field))
        if not found:
            raise ValueError(f"data={source!r} contains no text; give documents with text")
        documents += found
    return _each_once(documents)


def _each_once(documents: Iterable[Document]) -> list[Document]:
    """Keep the first of documents with the same text, so that no text serves two purposes."""
    found: dict[str, Document] = {}
    for document in documents:
        found.setdefault(document.sha256, document)
    return list(found.values())


def documents_of(texts: Any, field: str = "text") -> list[Document]:
    """Return documents from texts in memory, or from files; those with the same text once.

    Args:
        texts: one path or several, a list of strings (each is one document), or a
            ``datasets.Dataset`` with a text ``field``.

    Raises:
        ValueError: no text, a table or a dict, or a string in the list that is the path of a file.
    """
    if isinstance(texts, str) and ("\n" in texts or len(texts) > 1024):
        raise ValueError("texts is a string, which is taken as a path; give a list of strings")
    if isinstance(texts, str | Path):
        return read_documents([str(texts)], field)
    if hasattr(texts, "column_names"):
        return _each_once(_rows(_one_split(texts, "texts"), "texts", field))
    if isinstance(texts, Mapping | bytes) or hasattr(texts, "columns"):
        raise ValueError(
            f"texts is a {type(texts).__name__}; give a list of strings, such as one column of it"
        )
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
            documents.append(Document(f"texts[{number}]", _without_surrogates(item)))
    if not documents:
        raise ValueError("texts is empty; give documents with text")
    return _each_once(documents)


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
        if not source.strip():
            raise ValueError(f"{name} is {source!r}; give a file, a directory or a dataset")
        known = source in SOURCES or os.path.exists(source)
        if not known and not _is_hub_dataset(source):
            raise ValueError(f"{name}={source!r}: no such file or directory")


def _is_hub_dataset(source: str) -> bool:
    return bool(_HUB_DATASET.fullmatch(source)) and Path(source).suffix not in _FILES


def _read(source: str, field: str) -> Iterable[Document]:
    path = Path(source)
    if not source.strip():
        check_sources([source])
    elif (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        yield from _read_saved_dataset(path, field)
    elif path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if f.is_file()]
        ours = {file.parent for file in files if _is_result(file)} - {path}
        if ours:
            log.warning("skipped the results of longrope in %s", ", ".join(map(str, sorted(ours))))
            files = [file for file in files if not ours & set(file.parents)]
        rows = [file for file in files if file.suffix.lower() in _FILES_OF_ROWS]
        for file in files:
            if any(part.startswith(".") for part in file.relative_to(path).parts):
                continue
            if file.stem.upper() in _ABOUT and any(file.parent in row.parents for row in rows):
                log.warning("skipped %s, which is about the rows beside it", file)
                continue
            if file.suffix == ".md" and file.with_suffix(".gguf").exists():
                log.warning("skipped %s, the card of a GGUF file", file)
                continue
            try:
                found = list(_read_file(file, field))
                if not found:
                    raise ValueError(f"{file} contains no text")
            except ValueError as error:
                log.warning("skipped the whole file: %s", error)
                continue
            yield from found
    elif path.is_file():
        yield from _read_file(path, field)
    elif source in SOURCES:
        texts = library_texts(SOURCES[source])
        yield from (Document(name, text) for name, text in texts.items())
    else:
        check_sources([source])
        yield from _read_hub_dataset(source, field)


def _is_result(file: Path) -> bool:
    """Return whether a file shows that longrope wrote its directory: a run, search or export."""
    beside = {"history.jsonl": "state.json", "choices.json": "recipe.yaml"}.get(file.name)
    if beside:
        return file.with_name(beside).exists()
    return file.name in ("model.sha256", "longrope.json")


def _read_file(path: Path, field: str) -> Iterable[Document]:
    refuse_lfs_pointer(path)
    kind = path.suffix.lower()
    if kind == ".parquet":
        yield from _rows(_parquet_rows(path, field), str(path), field)
    elif kind in (".jsonl", ".ndjson", ".json"):
        yield from _rows(_json_rows(path), str(path), field)
    elif kind in _TABLES:
        yield from _rows(_table_rows(path, field, _TABLES[kind]), str(path), field)
    else:
        text = read_text(path)
        if not text.strip():
            raise ValueError(f"{path} is empty; give a document with text")
        if _is_row(text.lstrip().partition("\n")[0], field):
            raise ValueError(
                f"{path}: its first line is a JSON object with the field {field!r}; call the file "
                f"{path.name}.jsonl to read that field"
            )
        yield Document(path.name, text.replace("\r\n", "\n"))  # as Windows ends its lines


def read_text(path: Path) -> str:
    """Read a document or prompt from a UTF-8 text file.

    Raises:
        ValueError: a file that cannot be read, or is not text.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        kinds = (kind for kind, start in _COMPRESSED.items() if error.object.startswith(start))
        if kind := next(kinds, None):
            raise ValueError(f"{path} is compressed ({kind}); decompress it first") from None
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start:,} is 0x{error.object[error.start]:02x}"
            "); give text, JSON, JSONL, CSV, TSV or Parquet files"
        ) from None
    if (place := text.find("\0")) >= 0:
        line = text.count("\n", 0, place) + 1
        raise ValueError(f"{path}: line {line:,} has a NUL character; remove it, or leave it out")
    return text


def _json_rows(path: Path) -> Iterable[Any]:
    """Yield the rows of a JSON or JSONL file of documents.

    A ``.json`` file may hold JSON lines, one list or one object.
    """
    content = read_text(path)
    lines = [(n, line) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
    if path.suffix.lower() == ".json" and not (len(lines) > 1 and _is_json(lines[0][1])):
        whole = _parse_json(content, f"{path}")
        yield from whole if isinstance(whole, list) else [whole]
        return
    for number, line in lines:
        yield _parse_json(line, f"{path}: line {number:,}")


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{where} is not valid JSON ({why})") from None


def _is_json(text: str) -> bool:
    with contextlib.suppress(ValueError):
        _parse_json(text, "")
        return True
    return False


def _is_row(line: str, field: str) -> bool:
    """Return whether a line of text is a JSON object with the field."""
    with contextlib.suppress(ValueError):
        row = _parse_json(line, "")
        return isinstance(row, dict) and field in row
    return False


def _table_rows(path: Path, field: str, delimiter: str) -> Iterable[Any]:
    """Yield the rows of a CSV or TSV file with a header line, as objects."""
    csv.field_size_limit(2**31 - 1)  # a field may be a whole book
    content = io.StringIO(read_text(path), newline="")
    rows = csv.reader(content, delimiter=delimiter, strict=True)
    names: list[str] = []
    try:
        for row in rows:
            if not names:
                names = row
                if names and names.count(field) != 1:
                    twice = f" twice: rename one of {', '.join(names)}"
                    raise (
                        ValueError(f"{path} has the field {field!r}{twice}")
                        if field in names
                        else _no_field(str(path), field, names)
                    )
            elif row:
                if len(row) != len(names):
                    raise ValueError(
                        f"{path}: the row that ends in line {rows.line_num:,} has {len(row)} "
                        f"fields, but the first line names {len(names)}"
                    )
                yield dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}: line {rows.line_num:,} is not valid CSV ({error})") from None


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
        names = file.schema_arrow.names
        if field in names:
            for batch in file.iter_batches(columns=[field]):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a whole Parquet file ({error})") from None
    if field not in names:
        raise _no_field(str(path), field, names)


def _datasets(needed: str) -> Any:
    """Import the library ``datasets``, or say what it is needed for and how to install it."""
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise ValueError(f"{needed}: pip install 'longrope[datasets]'") from None


def _read_saved_dataset(path: Path, field: str) -> Iterable[Document]:
    """Read the documents of a directory that ``datasets``' ``save_to_disk`` wrote."""
    datasets = _datasets(f"{path} was written by datasets' save_to_disk; to read it")
    try:
        rows = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises a dozen types
        raise ValueError(f"{path} is not a whole dataset ({first_line(error)})") from None
    yield from _rows(_one_split(rows, str(path)), str(path), field)


def _one_split(rows: Any, where: str) -> Any:
    """Return a dataset, or the one of a ``DatasetDict`` that is for training.

    Raises:
        ValueError: it has several splits, and none of them is called train.
    """
    if not isinstance(rows.column_names, dict):  # of one dataset
        return rows
    if "train" in rows:
        return rows["train"]
    if len(rows) == 1:
        return next(iter(rows.values()))
    raise ValueError(f"{where} has the splits {', '.join(rows)}, and no train; give one of them")


def _read_hub_dataset(source: str, field: str) -> Iterable[Document]:
    datasets = _datasets(
        f"data={source!r}: no such file or directory; to read it as a dataset of the hub"
    )
    from longrope.progress import quiet  # it imports transformers

    name, _, split = source.partition(":")
    try:
        with quiet():
            rows = datasets.load_dataset(name, split=split or "train")
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
            texts = [name for name, value in row.items() if isinstance(value, str)]
            turns = next((name for name, value in row.items() if _is_chat(value)), None)
            if turns and not texts:
                raise _chat(f"{where}: row {number}", turns)
            others = [f"{name}: {type(value).__name__}" for name, value in row.items()]
            raise _no_field(f"{where}: row {number}", field, texts or others)
        if _is_chat(row[field]):
            raise _chat(f"{where}: row {number}", field)
        if not isinstance(row[field], str):
            raise ValueError(
                f"{where}: row {number} has {type(row[field]).__name__} in the field {field!r}; "
                "set `field` to a field that holds text"
            )
        text = _without_surrogates(row[field])
        if text.strip():
            yield Document(f"{Path(where).name}:{number}", text)


def _no_field(where: str, field: str, names: Iterable[str]) -> ValueError:
    return ValueError(
        f"{where} has no field {field!r}; set `field` to the one that holds the text (it has: "
        f"{', '.join(map(str, names)) or 'no fields'})"
    )


def _is_chat(value: Any) -> bool:
    turns = isinstance(value, list) and bool(value) and all(isinstance(x, dict) for x in value)
    return turns and bool({"role", "from", "content"} & value[0].keys())


def _chat(where: str, field: str) -> ValueError:
    return ValueError(
        f"{where} has the turns of a chat in the field {field!r}; write each chat as one text "
        "first, with the tokenizer's apply_chat_template(turns, tokenize=False)"
    )


def _without_surrogates(text: str) -> str:
    """Replace halves of surrogate pairs, which strings can hold, but no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
