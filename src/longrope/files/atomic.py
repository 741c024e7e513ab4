"""Atomic writes of files and directories, and recovery from a kill within one."""

import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
from safetensors import SafetensorError

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
        raise cannot_write(directory, error) from None
    finally:
        _delete(directory)


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
        apply_umask(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        _replace(target, temporary)
    # safetensors reports a full disk, and damaged files that it reads, by an error of its own.
    except (OSError, SafetensorError) as error:
        if "deserializing" in str(error):
            raise
        raise cannot_write(path, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def apply_umask(directory: Path) -> None:
    """Give the files of a new directory the permissions that the umask leaves to a new file.

    safetensors creates files of mode 0600, which nobody but their owner can read.
    """
    usual = directory.stat().st_mode & 0o666
    for file in directory.rglob("*"):
        _add_permissions(file, usual)


def _add_permissions(file: Path, permissions: int) -> None:
    """Add permissions to a file; not to a link, which shares them with another file."""
    found = file.lstat()
    if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
        with contextlib.suppress(OSError):  # some file systems have no permissions
            file.chmod(stat.S_IMODE(found.st_mode) | permissions)


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
    link stays, and its target is replaced. What a kill left of an earlier write is deleted.

    Raises:
        ValueError: it could not be written; an old file at ``path`` is unchanged.
    """
    target = path.resolve()
    temporary = _temporary(target, within=False)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        delete_leftovers(target.parent, f".{target.name}.")
        temporary.touch()
        usual = stat.S_IMODE(temporary.stat().st_mode)
        temporary.unlink()  # so that a block that writes nothing fails
        yield temporary
        _add_permissions(temporary, usual)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        _delete(temporary)


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


def require_directory(path: Path) -> None:
    """Check that files can be written in a directory, which need not exist yet.

    Raises:
        ValueError: it is no directory, or not writable.
    """
    try:
        whole = path.absolute()
        there = next(p for p in (whole, *whole.parents) if p.exists() or p.is_symlink())
    except OSError as error:  # too long a name
        raise cannot_write(path, error) from None
    if not there.is_dir():
        raise ValueError(f"{there} is not a directory; give a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise cannot_write(path, OSError(errno.EACCES, os.strerror(errno.EACCES)))


def cannot_write(path: Path, error: Exception) -> ValueError:
    """Return the error of a path that cannot be written, with the remedy that its cause needs."""
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
