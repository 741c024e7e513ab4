"""Files that are either whole or not there."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:
    fcntl = None


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
        raise _cannot_write(path, error) from None


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Give an empty directory to fill; it becomes ``path`` once it is whole and on the disk.

    What stood at ``path`` before is replaced.

    Raises:
        ValueError: something in it could not be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    # A full disk is an OSError to Python, another thing to safetensors.
    except (OSError, SafetensorError) as error:
        if "deserializing" in str(error):  # of what was read, not written
            raise
        raise _cannot_write(path, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary name to write at; the file becomes ``path`` once it is on the disk.

    Of what is written piece by piece; :func:`write_atomically` takes the whole content.

    Raises:
        ValueError: it could not be written; what stood at ``path`` before still stands.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


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
        raise _cannot_write(path, error) from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines, up to one that a kill cut short."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


class JsonlStore(dict[str, Any]):
    """What is computed already: each item is a synced line of a file as it is set.

    Processes that share a disk write a file each, and read all that are there.

    Args:
        path: of the first process; ``cells.jsonl``, say, and of the next ``cells.1.jsonl``.
        of: what the items here are parts of; the file may hold other things' parts.
    """

    def __init__(self, path: Path, of: str = "", rank: int = 0):
        self._path, self._of = path.with_suffix(f".{rank}.jsonl") if rank else path, of
        lines = read_lines(self._path)
        # A line that a kill cut short is dropped from the file too.
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        super().__init__()
        for file in sorted(path.parent.glob(f"{path.stem}*.jsonl")):
            items = ((x["key"], x["found"]) for x in read_lines(file) if x.get("of", "") == of)
            self.update(items)

    def __setitem__(self, key: str, found: Any) -> None:
        line = {"key": key, "found": found}
        append_line(self._path, line | {"of": self._of} if self._of else line)
        super().__setitem__(key, found)


def require_directory(path: Path) -> None:
    """See that files can be written in a directory, which need not be there yet.

    Raises:
        ValueError: they cannot.
    """
    try:
        whole = path.absolute()
        there = next(p for p in (whole, *whole.parents) if p.exists() or p.is_symlink())
    except OSError as error:  # too long a name
        raise _cannot_write(path, error) from None
    if not there.is_dir():
        raise ValueError(f"{there} is no directory; give one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise _cannot_write(path, OSError(errno.EACCES, os.strerror(errno.EACCES)))


@contextlib.contextmanager
def only_process(directory: Path) -> Iterator[None]:
    """Keep other processes out of a directory; a process that dies lets go of it.

    Raises:
        ValueError: another process is at work there, or files cannot be written.
    """
    if fcntl is None:  # Windows
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / ".lock").open("a")
    except OSError as error:
        raise _cannot_write(directory, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{directory}: another process is at work there; wait for it or give another --out"
            ) from None
        yield


def _cannot_write(path: Path, error: Exception) -> ValueError:
    why = getattr(error, "strerror", None) or str(error)
    return ValueError(
        f"{path}: cannot be written ({why}); free space there or give another "
        "directory, then run the same command again: what was finished is kept"
    )
