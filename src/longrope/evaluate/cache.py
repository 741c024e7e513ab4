"""What ``compare`` and ``evaluate`` have measured so far: on disk until they are done."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from longrope.files import JsonlStore, only_process, write_atomically
from longrope.models.load import LoadedModel
from longrope.rope.rescale import Rescale
from longrope.version import __version__


class MeasurementCache:
    """Measurements by what they are of: a model, its rescale, and what was asked.

    Without a directory nothing is kept.
    """

    def __init__(self, directory: Path | None = None):
        self._directory = directory
        self._keys: list[str] = []

    def losses(
        self, loaded: LoadedModel, rescale: Rescale, **asked: Any
    ) -> MutableMapping[str, np.ndarray]:
        """Losses by document: what was measured of these is there, what is set is kept."""
        if self._directory is None:
            return {}
        return _Losses(self._directory, self._key(loaded, [rescale], asked))

    def answers(
        self, loaded: LoadedModel, rescales: Sequence[Rescale | None], **asked: Any
    ) -> MutableMapping[str, Any]:
        """The same for what JSON holds, such as answers by question."""
        if self._directory is None:
            return {}
        return JsonlStore(self._directory / f"{self._key(loaded, rescales, asked)}.jsonl")

    def drop(self) -> None:
        """Delete all that was asked for here; other commands' measurements stay."""
        assert self._directory is not None
        for key in self._keys:
            for file in self._directory.glob(f"{key}*"):
                file.unlink()

    def _key(
        self, loaded: LoadedModel, rescales: Sequence[Rescale | None], asked: dict[str, Any]
    ) -> str:
        factors = [rescale and rescale.to_json() | {"provenance": {}} for rescale in rescales]
        named = ("_name_or_path", "transformers_version")
        config = {k: v for k, v in loaded.model.config.to_dict().items() if k not in named}
        what = [__version__, loaded.fingerprint(), str(loaded.model.dtype), config]
        content = json.dumps([*what, factors, asked], sort_keys=True, default=str)
        self._keys.append(hashlib.sha256(content.encode()).hexdigest()[:16])
        return self._keys[-1]


@contextlib.contextmanager
def measurement_cache(directory: Path | None, group_size: int = 1) -> Iterator[MeasurementCache]:
    """What is measured within is kept in ``directory / "unfinished"`` until the end of it.

    Not with a team, whose processes would have to see the same files.

    Raises:
        ValueError: another process is measuring there.
    """
    if directory is None or group_size > 1:
        yield MeasurementCache()
        return
    directory = directory / "unfinished"
    with only_process(directory):
        unfinished = MeasurementCache(directory)
        try:
            yield unfinished
            unfinished.drop()
        finally:
            if [file.name for file in directory.iterdir()] == [".lock"]:
                shutil.rmtree(directory)


def require_same(file: Path, of: dict[str, Any]) -> None:
    """See that measurements which are there already are of the same.

    Raises:
        ValueError: they are of something else, or no measurements.
    """
    if not file.exists():
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))["of"]
        other = [f"{key} {before[key]}" for key in before if before[key] != of.get(key)]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file}: does not say what it is of; give another --out") from None
    if other:
        raise ValueError(
            f"{file}: holds another measurement ({', '.join(other)}); give another --out, or "
            "delete it"
        )


class _Losses(dict[str, np.ndarray]):
    """A safetensors file for each item."""

    def __init__(self, directory: Path, key: str):
        super().__init__()
        self._directory, self._key = directory, key
        for file in directory.glob(f"{key}-*.safetensors"):
            try:
                found = load_file(file)["losses"]
            except (SafetensorError, OSError, KeyError):
                continue  # measured again
            super().__setitem__(file.stem.partition("-")[2], found)

    def __setitem__(self, name: str, losses: np.ndarray) -> None:
        content = save({"losses": np.ascontiguousarray(losses)})
        write_atomically(self._directory / f"{self._key}-{name}.safetensors", content)
        super().__setitem__(name, losses)
