"""What an export was meant to be, written beside it for ``verify`` and ``import``."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from longrope.files import write_atomically
from longrope.rope.pair import RescalePair
from longrope.rope.rescale import UNROTATED, Rescale

Format = Literal["hf", "hf-static", "gguf", "gguf-static"]
FORMATS: tuple[Format, ...] = ("hf", "hf-static", "gguf", "gguf-static")
FILE = "longrope.json"
_SCHEMA = 1
_ROUNDING = 1e-6  # GGUF's tensors are float32


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The rescales of an export, exactly, and how they were written down.

    Args:
        pair: the rescales for the weights as they were before the export.
        folded: the attention factor that engines compute by themselves and the config now
            says; what is left of the pair's is in the query projections. None where the
            weights are as they were.
    """

    format: Format
    source: str
    pair: RescalePair
    folded: float | None = None

    @property
    def static(self) -> bool:
        """Whether the long factors serve every length."""
        return self.format.endswith("-static")

    @property
    def written(self) -> RescalePair:
        """The pair that the exported weights go with."""
        pair = RescalePair(self.pair.long, self.pair.long) if self.static else self.pair
        if self.folded is None:
            return pair
        return RescalePair(
            pair.short.replace(attention_factor=self.folded),
            pair.long.replace(attention_factor=self.folded),
        )

    def describes(self, found: RescalePair) -> bool:
        """Whether this is still about the checkpoint that it lies beside, whose pair is given."""
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
        """Read what :meth:`to_json` gave.

        Raises:
            ValueError: something else.
        """
        try:
            if data["schema"] != _SCHEMA or data["format"] not in FORMATS:
                raise ValueError(f"schema {data['schema']}, format {data['format']!r}")
            pair = RescalePair(Rescale.from_json(data["short"]), Rescale.from_json(data["long"]))
            return cls(data["format"], data["source"], pair, data["folded"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{FILE}: not what this longrope writes ({error})") from None

    def save(self, directory: Path) -> None:
        """Write ``longrope.json``."""
        write_atomically(directory / FILE, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "Manifest | None":
        """Of a directory; None where it has no ``longrope.json``."""
        file = directory / FILE
        return cls.from_json(json.loads(file.read_text("utf-8"))) if file.exists() else None
