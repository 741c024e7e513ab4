"""Lock a directory against other processes."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from longrope.files.atomic import cannot_write, delete_leftovers

try:
    import fcntl
except ImportError:
    fcntl = None


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
            raise cannot_write(directory, error) from None
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
