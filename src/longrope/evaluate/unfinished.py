"""What ``compare`` and ``evaluate`` have measured so far: on disk until they are done."""

import hashlib
import json
import shutil
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from longrope.files import Kept, whole_file
from longrope.model import LoadedModel
from longrope.rope.rescale import Rescale


class Unfinished:
    """Measurements by what they are of: a model's weights, its rescale, and what was asked.

    A directory ``unfinished`` inside ``directory``, gone when all is done; without one nothing is
    kept. Nor with a team, whose processes would have to see the same files.
    """

    def __init__(self, directory: Path | None = None, team: int = 1):
        self._directory = directory / "unfinished" if directory and team == 1 else None

    def losses(
        self, loaded: LoadedModel, rescale: Rescale, **asked: Any
    ) -> MutableMapping[str, np.ndarray]:
        """Losses by document: what was measured of these is there, what is set is kept."""
        if self._directory is None:
            return {}
        return _Losses(self._directory, _key(loaded, [rescale], asked))

    def answers(
        self, loaded: LoadedModel, rescales: Sequence[Rescale | None], **asked: Any
    ) -> MutableMapping[str, Any]:
        """The same for what JSON holds, such as answers by question."""
        if self._directory is None:
            return {}
        return Kept(self._directory / "answers.jsonl", of=_key(loaded, rescales, asked))

    def done(self) -> None:
        """Drop it: the result says it all."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def _key(loaded: LoadedModel, rescales: Sequence[Rescale | None], asked: dict[str, Any]) -> str:
    factors = [r and {k: v for k, v in r.to_json().items() if k != "provenance"} for r in rescales]
    what = [loaded.fingerprint(), str(loaded.model.dtype), factors, asked]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


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
        with whole_file(self._directory / f"{self._key}-{name}.safetensors") as temporary:
            save_file({"losses": np.ascontiguousarray(losses)}, temporary)
        super().__setitem__(name, losses)
