"""Results that are kept as they come: JSON-lines files, and arrays with a hash."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from longrope.files.atomic import atomic_file, cannot_write, write_atomically
from longrope.files.parse import parse_integer


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to a safetensors file of a cache, atomically and with a hash of their content.

    Raises:
        ValueError: the file could not be written.
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {"sha256": _arrays_digest(path, contiguous)}
    with atomic_file(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata)  # straight to the disk, not through memory
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be written ({error})") from None


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Read the arrays that :func:`write_arrays` wrote under this name.

    Returns:
        None where there is no such file, or where it is damaged or has another name.
    """
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            digest = (file.metadata() or {}).get("sha256")
    # NumPy lacks some dtypes, which a damaged header can name.
    except (OSError, SafetensorError, TypeError, AttributeError):
        return None
    return arrays if digest == _arrays_digest(path, arrays) else None


def _arrays_digest(path: Path, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(path.name.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f" {name} {array.dtype} {array.shape} ".encode())
        digest.update(array.data)
    return digest.hexdigest()


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one line to a JSON-lines file, and sync it to the disk.

    Raises:
        ValueError: the line could not be written; earlier lines are unchanged.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from None


def finite_or_none(value: float) -> float | None:
    """Return a number for a JSON file: itself if finite, else None."""
    return value if math.isfinite(value) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the JSON objects of a JSON-lines file, up to a line that a kill cut short."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line, parse_int=parse_integer)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


class JsonlStore(dict[str, Any]):
    """Dictionary of results, stored as synced lines of a JSON-lines file as they are set.

    Processes that share a disk write a file each, and read all files.

    Args:
        path: the file of rank 0, such as ``cells.jsonl``; rank 1 has ``cells.1.jsonl``.
        rank: of this process.
    """

    def __init__(self, path: Path, rank: int = 0):
        self._path = path.with_suffix(f".{rank}.jsonl") if rank else path
        lines = read_lines(self._path)
        # A line that a kill cut short is dropped from the file too.
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        super().__init__()
        for file in sorted(path.parent.glob(f"{path.stem}*.jsonl")):
            found = (line for line in read_lines(file) if {"key", "found"} <= line.keys())
            self.update((str(line["key"]), line["found"]) for line in found)

    def __setitem__(self, key: str, found: Any) -> None:
        append_line(self._path, {"key": key, "found": found})
        super().__setitem__(key, found)
