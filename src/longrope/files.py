"""Files that are either whole or not there."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a temporary file beside ``path``, sync it, and rename it over ``path``.

    Raises:
        ValueError: the file could not be written (disk full, no permission); what
            stood at ``path`` before still stands.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ValueError(
            f"{path}: cannot be written ({error.strerror}); free space there or give another "
            "directory, then run the same command again"
        ) from None


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line and sync it to the disk.

    Raises:
        ValueError: the line could not be written; the lines before it still stand.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be written ({error.strerror}); free space there, then run the same "
            "command again: it resumes"
        ) from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
