"""The manifest of an export: its exact rescales, for ``verify`` and ``import``."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from longrope.errors import shortened
from longrope.files.atomic import write_atomically
from longrope.files.parse import read_json
from longrope.rope.pair import RescalePair
from longrope.rope.rescale import UNROTATED, Rescale, default_attention_factor

Format = Literal["hf", "hf-static", "gguf", "gguf-static"]
FORMATS: tuple[Format, ...] = ("hf", "hf-static", "gguf", "gguf-static")
FILE = "longrope.json"
_SCHEMA = 1
_ROUNDING = 1e-6  # GGUF's tensors are float32


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Manifest of an export: its exact rescales, and how the checkpoint holds them.

    Args:
        pair: the rescales for the weights before the export.
        folded: the attention factor in the config, which engines compute by themselves; the
            rest of the pair's is folded into the query projections. None for unchanged weights.
    """

    format: Format
    source: str
    pair: RescalePair
    folded: float | None = None

    @property
    def static(self) -> bool:
        """Whether the export in this manifest is static: long factors serve every length."""
        return self.format.endswith("-static")

    @property
    def switches(self) -> bool:
        """Whether short sequences have other factors than long ones in the exported checkpoint."""
        short, long = self.written.short, self.written.long
        return (short.factors, short.attention_factor) != (long.factors, long.attention_factor)

    @property
    def computed_attention_factor(self) -> float:
        """Attention factor that an engine computes from the manifest's lengths if it reads none."""
        boundary = (self.pair.long if self.static else self.pair.short).max_position_embeddings
        return default_attention_factor(boundary, self.pair.long.max_position_embeddings)

    @property
    def written(self) -> RescalePair:
        """The manifest's pair after folding; in a static export the long factors are in both."""
        pair = RescalePair(self.pair.long, self.pair.long) if self.static else self.pair
        if self.folded is None:
            return pair
        return RescalePair(
            pair.short.replace(attention_factor=self.folded),
            pair.long.replace(attention_factor=self.folded),
        )

    def describes(self, found: RescalePair) -> bool:
        """Return whether the manifest still describes a checkpoint with the pair ``found``."""
        return all(
            a.max_position_embeddings == b.max_position_embeddings
            and len(a.factors) == len(b.factors)
            and np.allclose(*np.minimum([a.factors, b.factors], UNROTATED), rtol=_ROUNDING)
            and np.isclose(a.attention_factor, b.attention_factor, rtol=_ROUNDING)
            for a, b in ((self.written.short, found.short), (self.written.long, found.long))
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": _SCHEMA,
            "format": self.format,
            "source": self.source,
            "folded": self.folded,
            "short": self.pair.short.to_json(),
            "long": self.pair.long.to_json(),
        }

    @classmethod
    def from_json(cls, data: Any) -> "Manifest":
        """Read a manifest from its JSON.

        Raises:
            ValueError: the JSON is no manifest of this schema.
        """
        try:
            if data["schema"] != _SCHEMA or data["format"] not in FORMATS:
                raise ValueError(f"schema {data['schema']}, format {data['format']!r}")
            pair = RescalePair(Rescale.from_json(data["short"]), Rescale.from_json(data["long"]))
            folded = data["folded"]
            if not (folded is None or (isinstance(folded, int | float) and 0 < folded < 1e36)):
                raise ValueError(f"folded is {shortened(folded)}")
            return cls(data["format"], str(data["source"]), pair, folded)
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(
                f"{FILE} is damaged, or of another version of longrope ({error}); export again"
            ) from None

    def save(self, directory: Path) -> None:
        """Write the manifest of an export, ``longrope.json``."""
        write_atomically(directory / FILE, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "Manifest | None":
        """Read the manifest of an export; None where the directory has no ``longrope.json``."""
        file = directory / FILE
        if not file.exists():
            return None
        found = read_json(file)
        try:
            return cls.from_json(found)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None
