"""Checked reads of JSON and YAML, atomic writes, JSON-lines stores, and directory locks."""

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil
import yaml
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from longrope.errors import shortened

try:
    import fcntl
except ImportError:
    fcntl = None


# Temporary files and directories. The process that wrote one is in its name: once that process has
# ended, nothing will complete it.
_TEMPORARY = re.compile(r"\.(?:.+\.)?longrope-tmp-(\d+)", re.DOTALL)


def is_temporary(name: str) -> bool:
    """Return whether a file of this name is a temporary one of any process."""
    return _TEMPORARY.fullmatch(name) is not None


def delete_leftovers(directory: Path, start: str = ".") -> None:
    """Delete the temporary files that killed processes left in a directory.

    Args:
        start: of the names to delete, as ``".NAME."`` for those of one file.
    """
    try:
        names = os.listdir(directory)
    except OSError:  # not a directory, or not readable
        return
    for name in names:
        if is_temporary(name) and name.startswith(start) and _is_abandoned(directory / name):
            _delete(directory / name)


def _is_abandoned(temporary: Path) -> bool:
    """Return whether the process that wrote a temporary file has ended."""
    process = temporary.name.rpartition("-")[2]
    try:
        started, written = psutil.Process(int(process)).create_time(), temporary.lstat().st_mtime
    except (psutil.Error, OverflowError):
        return True
    except OSError:  # it is no longer there
        return False
    return started > written  # another process has got the number since


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


@contextlib.contextmanager
def scratch_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory on the disk of a path for files that are needed to write it.

    :func:`recover` deletes it if a kill left it.

    Raises:
        ValueError: it could not be created, or a file in it could not be written.
    """
    target = path.resolve()
    end = f"scratch.longrope-tmp-{os.getpid()}"
    directory = target / f".{end}" if target.is_dir() else target.with_name(f".{target.name}.{end}")
    try:
        directory.mkdir(parents=True)
        yield directory
    except OSError as error:
        raise _cannot_write(directory, error) from None
    finally:
        _delete(directory)


_LONGEST_INTEGER = 300  # digits: it still fits a float
# Raised by code that meets content of other types than it expects.
_WRONG_CONTENT = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


def read_json(path: Path, kind: Any = dict[str, Any]) -> Any:
    """Read a JSON file into a value of a known type.

    Args:
        kind: the type of the content, as pydantic checks it: a ``TypedDict``, ``list[str]``, …

    Raises:
        ValueError: no such file, not JSON, nested too deeply, an integer of hundreds of digits, or
            another type; it names the file, the field and its value.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_int=_integer)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except RecursionError:
        raise ValueError(f"{path}: is not valid JSON (nested too deeply)") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not JSON (not UTF-8 text)") from None
    except ValueError as error:
        raise ValueError(f"{path}: is not valid JSON ({error})") from None
    try:
        return _adapter(kind).validate_python(found)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "its content"
        raise ValueError(
            f"{path}: {field} is {shortened(first['input'])}: {first['msg'].lower()}"
        ) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        OSError: it cannot be read.
        ValueError: what :func:`parse_yaml` refuses, or no mapping; it names the file.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        why = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error
        raise ValueError(f"{path} is not valid YAML ({why})") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} is not a mapping of keys to values")
    return content


def parse_yaml(text: str) -> Any:
    """Parse YAML without tags that run code or duplicate keys, and with bounded aliases.

    Raises:
        ValueError: not such YAML.
    """
    try:
        return yaml.load(text, _YamlLoader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    # Its constructors raise other types for single values, such as KeyError for `!!bool maybe`.
    except (yaml.YAMLError, *_WRONG_CONTENT) as error:
        raise ValueError(" ".join(str(error).split())) from None


class _YamlLoader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys, as the YAML specification does.

    It refuses aliases that stand for more values than any file of ours has: nested ones, each of
    several copies of the one before, grow without bounds.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _expanded(node, {}) > _MOST_NODES:
            raise yaml.YAMLError(f"its aliases stand for more than {_MOST_NODES:,} values")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"{key.value!r} stands twice, again in line {line}")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# Values of a YAML file at most, each counted as often as aliases repeat it.
_MOST_NODES = 10_000


def _expanded(node: yaml.Node, known: dict[int, float]) -> float:
    """Count the values of a YAML node, aliases written out; infinite within themselves."""
    if id(node) not in known:
        known[id(node)] = math.inf
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [one for pair in node.value for one in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        known[id(node)] = 1 + sum(_expanded(one, known) for one in inner)
    return known[id(node)]


@contextlib.contextmanager
def content_of(path: Path, remedy: str) -> Iterator[None]:
    """Name a file whose content the code within cannot use: missing keys, or values of other types.

    Args:
        remedy: what to do about it, such as "run the comparison again".

    Raises:
        ValueError: the code within raised an error of that kind.
    """
    try:
        yield
    except RecursionError:
        raise ValueError(f"{path}: is nested too deeply; {remedy}") from None
    except _WRONG_CONTENT as error:
        known = (str(path), str(path.parent))
        if isinstance(error, ValueError) and str(error).startswith(known):
            raise
        what = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: is damaged ({shortened(what, 200)}); {remedy}") from None


def _integer(digits: str) -> int:
    if len(digits) > _LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


_adapter = functools.cache(TypeAdapter)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically: sync a temporary file beside it, and rename that.

    A symbolic link stays, and its target is replaced.

    Raises:
        ValueError: the file could not be written (disk full, no permission); an old file at
            ``path`` is unchanged.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(
            content.encode(errors="backslashreplace") if isinstance(content, str) else content
        )


def copy_file(source: Path, target: Path) -> None:
    """Copy a file through links; the copy shares storage only as a reflink, which writes split."""
    if fcntl is not None:
        with source.open("rb") as old, target.open("wb") as new, contextlib.suppress(OSError):
            fcntl.ioctl(new, _FICLONE, old.fileno())
            return
    shutil.copyfile(source, target)


_FICLONE = 0x40049409  # of Linux, on file systems such as Btrfs and XFS


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Write a directory atomically: yield an empty one, which replaces ``path`` once synced.

    A directory at ``path`` survives a kill at any point: it is renamed aside before the new one
    takes its name, and deleted last. A symbolic link stays, and its target is replaced. A mount
    point cannot be renamed, so its files are exchanged one by one. The next call, or
    :func:`recover`, completes or undoes a replacement that a kill interrupted.

    Raises:
        ValueError: a file could not be written; the old contents stand.
    """
    target = path.resolve()
    temporary = _temporary(target, within=False)
    try:
        recover(target)
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        # Within an existing directory: the new files are then on the same disk for certain.
        temporary = _temporary(target, within=target.is_dir())
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        _replace(target, temporary)
    # safetensors reports a full disk, and damaged files that it reads, by an error of its own.
    except (OSError, SafetensorError) as error:
        if "deserializing" in str(error):
            raise
        raise _cannot_write(path, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def recover(path: Path) -> None:
    """Complete or undo an atomic write of a file or directory that a kill interrupted.

    ``path`` then holds all the old contents or all the new ones. Temporary files of processes
    that have ended are deleted.
    """
    target = path.resolve()
    aside = _aside(target)
    if aside.exists() and not target.exists():
        os.rename(aside, target)
    elif aside.exists():
        _delete_at_once(aside, target, within=False)
    delete_leftovers(target.parent, f".{target.name}.")
    delete_leftovers(target)
    old, new, moving = (target / name for name in (_OLD, _NEW, _MOVING))
    if moving.exists():  # some old files are in it, and no new file is in the directory yet
        _move_contents(moving, target)
        moving.rmdir()
    elif old.exists():  # all old files are in it
        if new.exists():
            _move_contents(new, target)
        _delete_at_once(old, target, within=True)
    if new.exists():
        _delete_at_once(new, target, within=True)


# While the contents of a directory are exchanged: the old files until all are moved, all the old
# files, and the new ones.
_MOVING, _OLD, _NEW = ".longrope-moving", ".longrope-old", ".longrope-new"
_OWN = (_MOVING, _OLD, _NEW, "lost+found")
# Renaming fails so for a mount point, across mounts, and in a parent without write permission.
_NOT_RENAMED = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS)


def _temporary(target: Path, within: bool) -> Path:
    end = f"longrope-tmp-{os.getpid()}"
    return target / f".{end}" if within else target.with_name(f".{target.name}.{end}")


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.longrope-old")


def _replace(target: Path, new: Path) -> None:
    """Rename a complete directory to ``target``, or exchange the files where that fails.

    Where ``target`` exists, it contains ``new``.
    """
    if not target.exists():
        os.rename(new, target)
        return
    outside, aside = _temporary(target, within=False), _aside(target)
    try:
        os.rename(new, outside)
        try:
            os.rename(target, aside)
        except OSError:
            os.rename(outside, new)
            raise
    except OSError as error:
        if error.errno not in _NOT_RENAMED:
            raise
        try:
            _exchange_contents(target, new)
        except OSError:
            recover(target)
            raise
        return
    try:
        os.rename(outside, target)
    except OSError:
        os.rename(aside, target)
        shutil.rmtree(outside, ignore_errors=True)
        raise
    _delete_at_once(aside, target, within=False)


def _exchange_contents(target: Path, new: Path) -> None:
    """Replace the files in a directory that cannot be renamed; see :func:`recover`."""
    os.rename(new, target / _NEW)
    (target / _MOVING).mkdir()
    _move_contents(target, target / _MOVING)
    os.rename(target / _MOVING, target / _OLD)
    _move_contents(target / _NEW, target)
    _delete_at_once(target / _OLD, target, within=True)
    (target / _NEW).rmdir()


def _move_contents(source: Path, target: Path) -> None:
    for entry in sorted(source.iterdir()):
        if entry.name not in _OWN and not is_temporary(entry.name):
            os.rename(entry, target / entry.name)


def _delete_at_once(directory: Path, target: Path, within: bool) -> None:
    """Delete a directory under a temporary name, so a kill never leaves half of it at its path."""
    temporary = _temporary(target, within)
    shutil.rmtree(temporary, ignore_errors=True)
    os.rename(directory, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file atomically in parts: yield a temporary path, sync it, and rename it.

    For content written in parts; :func:`write_atomically` takes the whole content. A symbolic
    link stays, and its target is replaced.

    Raises:
        ValueError: it could not be written; an old file at ``path`` is unchanged.
    """
    target = path.resolve()
    temporary = _temporary(target, within=False)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise _cannot_write(path, error) from None
    finally:
        _delete(temporary)


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


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    """Make a temporary directory for a ``with`` block.

    Raises:
        ValueError: none can be made, or the disk is full; names TMPDIR.
    """
    try:
        directory = tempfile.mkdtemp()
    except OSError as error:
        raise _no_temporary_files(error) from None
    try:
        yield Path(directory)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_temporary_files(error) from None
        raise
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _no_temporary_files(error: OSError) -> ValueError:
    return ValueError(
        f"temporary files cannot be written ({error.strerror or error}); set TMPDIR to a directory "
        "with free space"
    )


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
        raise _cannot_write(path, error) from None


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
            record = json.loads(line, parse_int=_integer)
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


def require_directory(path: Path) -> None:
    """Check that files can be written in a directory, which need not exist yet.

    Raises:
        ValueError: it is no directory, or not writable.
    """
    try:
        whole = path.absolute()
        there = next(p for p in (whole, *whole.parents) if p.exists() or p.is_symlink())
    except OSError as error:  # too long a name
        raise _cannot_write(path, error) from None
    if not there.is_dir():
        raise ValueError(f"{there} is not a directory; give a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise _cannot_write(path, OSError(errno.EACCES, os.strerror(errno.EACCES)))


@contextlib.contextmanager
def only_process(directory: Path) -> Iterator[None]:
    """Lock a directory against other processes until the context or the process ends.

    The directory is created. It is removed again if nothing was written to it. Temporary files
    that killed processes left in it, or in the directories in it, are deleted.

    Raises:
        ValueError: another process holds the lock, or files cannot be written.
    """
    if fcntl is None:  # Windows
        yield
        return
    created = [path for path in (directory, *directory.parents) if not path.exists()]
    with _locked(directory) as lock:
        for place in (directory, *directory.iterdir()):
            delete_leftovers(place)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if os.listdir(directory) == [lock.name]:
                    lock.unlink()
                    for path in created:
                        path.rmdir()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[Path]:
    """Hold the lock file of a directory, and yield its path."""
    assert fcntl is not None
    path = directory / ".lock"
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = path.open("a")
        except FileNotFoundError:  # another process removed the directory in between
            continue
        except OSError as error:
            raise _cannot_write(directory, error) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(
                    f"{directory} is in use by another process; wait for it, or give another `out`"
                ) from None
            # The process that held it before may have removed the file that this one opened.
            if _is_same_file(path, file):
                yield path
                return


def _is_same_file(path: Path, file: IO[str]) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    return False


def _cannot_write(path: Path, error: Exception) -> ValueError:
    why = getattr(error, "strerror", None) or str(error)
    number = getattr(error, "errno", None)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "give a directory that you may write to, or change its permissions"
    elif number in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP):
        remedy = "give another path"
    else:
        remedy = "free disk space or give another directory"
    return ValueError(
        f"{shortened(str(path), 200)} cannot be written ({why}); {remedy}, then run the same "
        "command again: finished work is kept"
    )
