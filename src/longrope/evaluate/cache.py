"""Cache of unfinished measurements, so that interrupted ones resume."""

import contextlib
import shutil
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np

from longrope.files.atomic import delete_leftovers
from longrope.files.lock import only_process
from longrope.files.parse import read_json
from longrope.files.stores import JsonlStore, read_arrays, write_arrays


class MeasurementCache:
    """Cache on disk for the parts of unfinished measurements, by :attr:`Measurement.key`.

    Args:
        directory: where the files are; None stores nothing.
        rank: of the process; processes that share a disk write their own files and read all.
    """

    def __init__(self, directory: Path | None = None, rank: int = 0):
        self._directory, self._rank = directory, rank
        self._keys: list[str] = []

    def losses(self, key: str) -> MutableMapping[str, np.ndarray]:
        """Return the cached losses of a measurement by document; each assignment is stored."""
        self._keys.append(key)
        return {} if self._directory is None else _Losses(self._directory, key)

    def answers(self, key: str) -> MutableMapping[str, Any]:
        """Return the cached answers of a retrieval or benchmark; each assignment is stored.

        Keys are the trial numbers of a retrieval, or the parts of a benchmark.
        """
        self._keys.append(key)
        if self._directory is None:
            return {}
        return JsonlStore(self._directory / f"{key}.jsonl", rank=self._rank)

    def drop(self) -> None:
        """Delete the measurements that were opened through this cache, and no others."""
        for key in self._keys:
            for file in self._directory.glob(f"{key}*") if self._directory else ():
                file.unlink(missing_ok=True)
        self._keys = []


@contextlib.contextmanager
def measurement_cache(directory: Path | None, group_size: int = 1) -> Iterator[MeasurementCache]:
    """Open a measurement cache in ``directory / "unfinished"``; a block that succeeds deletes it.

    A sequence-parallel group (``group_size`` above 1) gets no cache: its processes would have to
    see the same files.

    Raises:
        ValueError: another process is measuring there.
    """
    if directory is None or group_size > 1:
        yield MeasurementCache()
        return
    results, directory = directory, directory / "unfinished"
    with only_process(directory):
        delete_leftovers(results)
        cache = MeasurementCache(directory)
        try:
            yield cache
            cache.drop()
        finally:
            if [file.name for file in directory.iterdir()] == [".lock"]:
                shutil.rmtree(directory)


def require_same(file: Path, of: dict[str, Any]) -> None:
    """Check that the measurements stored in a file have the same settings as new ones.

    Raises:
        ValueError: other settings, or no measurements in it.
    """
    if not file.exists():
        return
    try:
        before = read_json(file)["of"]
        other = [f"{key} {before[key]}" for key in before if before[key] != of.get(key)]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(
            f"{file} does not hold a measurement; give another `out`, or delete the file"
        ) from None
    if other:
        raise ValueError(
            f"{file} holds another measurement ({', '.join(other)}); give another `out`, or "
            "delete the file"
        )


class _Losses(dict[str, np.ndarray]):
    """Cached losses by document, each in a safetensors file."""

    def __init__(self, directory: Path, key: str):
        super().__init__()
        self._directory, self._key = directory, key
        for file in directory.glob(f"{key}-*.safetensors"):
            found = read_arrays(file)
            if found is not None:  # a damaged one is measured again
                super().__setitem__(file.stem.removeprefix(f"{key}-"), found["losses"])

    def __setitem__(self, name: str, losses: np.ndarray) -> None:
        file = self._directory / f"{self._key}-{name}.safetensors"
        write_arrays(file, {"losses": losses})
        super().__setitem__(name, losses)
