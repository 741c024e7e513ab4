"""The files of a search: its identity, state and history, from which it resumes."""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from longrope.files.atomic import write_atomically
from longrope.files.parse import read_json
from longrope.files.stores import read_lines
from longrope.search.settings import EvolutionSearchConfig, GradientSearchConfig

log = logging.getLogger(__name__)

SCHEMA = 4  # 1: before the search options were renamed; 3: without the config of the model


@dataclasses.dataclass(frozen=True)
class SearchIdentity:
    """Identity of a search, stored beside its history: everything that decides its course.

    Equal identities are the same search. ``model``, ``documents`` and ``tokens`` (of windows and
    prompts) are content hashes. ``chunk_size`` and ``device`` decide the last bits of a loss.
    ``config`` counts with the fields that its ``identity()`` returns.
    """

    model: str
    documents: tuple[str, ...]
    tokens: str
    length: int
    config: GradientSearchConfig | EvolutionSearchConfig
    seed: int
    dtype: str
    device: str
    chunk_size: int
    start: dict[str, Any]
    bound: float  # the largest factor, where the configuration leaves it open too
    start_tokens: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content |= {"config": None} | self.config.identity()
        del content["config"]
        return json.loads(json.dumps(content))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def require_search_directory(directory: Path) -> None:
    """Refuse a directory whose history or factors were not written by a search.

    Raises:
        ValueError: an extension or an import wrote it, and its files would be overwritten.
    """
    if (directory / "state.json").exists():
        return
    for name in ("history.jsonl", "rescale.json", "recipe.yaml"):
        if (directory / name).exists():
            raise ValueError(
                f"{directory / name} exists without a search's state.json; give another `out`, "
                "or delete the file"
            )


class Record:
    """Record of one search in its directory: its identity, progress and evaluation history.

    ``history.jsonl`` holds a line per evaluation, each synced; ``state.json`` the identity, and
    the progress after the last complete generation.
    """

    def __init__(self, directory: Path, config: SearchIdentity):
        self.directory = directory
        self.config = config
        self.history = directory / "history.jsonl"
        self.state = directory / "state.json"

    def open(self) -> list[dict[str, Any]]:
        """Open the record of a search, and return its history; empty in a new directory.

        Raises:
            ValueError: the directory holds another search (the differing fields are
                named) or a damaged state, or it cannot be written.
        """
        require_search_directory(self.directory)
        if not self.state.exists():
            self.save_state(0, 0)
            return []
        before, digest = self._read_state()
        if digest != self.config.sha256:
            now = self.config.to_json()
            fields = [k for k in now if before.get(k) != now[k]] or ["config_hash"]
            # Hashes of the text follow from other settings, such as the number of windows.
            fields = [k for k in fields if k not in ("documents", "tokens")] or fields
            shown = ", ".join(
                f"{k} (there {_short(before.get(k))}, now {_short(now.get(k))})" for k in fields
            )
            raise ValueError(
                f"{self.directory} holds another search; it differs in {shown}; give another `out`"
            )
        lines = read_lines(self.history)
        there = self.history.read_bytes().count(b"\n") if self.history.exists() else 0
        if there > len(lines):
            log.warning(
                "%s: line %d is damaged; what follows it is computed again",
                self.history,
                len(lines) + 1,
            )
        # A line that a kill cut short is removed from the file; the next would be appended to it.
        write_atomically(self.history, "".join(json.dumps(line) + "\n" for line in lines))
        return lines

    def _read_state(self) -> tuple[dict[str, Any], str]:
        schema: Any = None
        try:
            saved = read_json(self.state)
            schema = saved["schema"]
            if schema == SCHEMA and isinstance(saved["config"], dict):
                return saved["config"], saved["config_hash"]
        except (ValueError, KeyError, TypeError):
            pass
        if type(schema) is int and schema < SCHEMA:
            raise ValueError(
                f"{self.directory} holds a search of an older version of longrope (schema "
                f"{schema}, this version has {SCHEMA}); give another `out`, or use that version"
            )
        raise ValueError(
            f"{self.state} is damaged; give another `out`, or delete {self.directory} to start over"
        )

    def save_state(self, evaluations: int, generation: int) -> None:
        """Write ``state.json`` beside the search history, atomically."""
        state = {
            "schema": SCHEMA,
            "config_hash": self.config.sha256,
            "config": self.config.to_json(),
            "generation": generation,
            "evaluations": evaluations,
        }
        write_atomically(self.state, json.dumps(state, indent=1) + "\n")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"
