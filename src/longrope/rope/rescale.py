"""The value that everything in longrope produces or consumes: one rescaled RoPE."""

import csv
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longrope.files import write_atomically

SCHEMA = 1
# Some models turn a part of the dimensions that they have frequencies for, the others' being 0
# (Gemma 4). Factors can say that only by one under which nothing turns.
UNTURNED = 1e30


def default_inv_freq(rope_theta: float, rotary_dim: int) -> np.ndarray:
    """Unscaled frequencies θ^(−2i/d) in radians per token, shape (d/2,), float64."""
    return rope_theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim)


def default_attention_factor(original: int, target: int) -> float:
    """√(1 + ln s / ln L), the temperature that inference engines compute by themselves.

    It multiplies cos and sin, so logits of attention grow by its square. From the
    Phi-3 models; not in the LongRoPE paper. ``original`` is L and s = target / L.
    """
    scale = target / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class Rescale:
    """A non-uniform rescale of RoPE (LongRoPE eq. 3).

    Pair i of a rotary dimension d turns by ``position · θ^(−2i/d) / factors[i]``
    from position ``start_tokens`` on, and by the original angle before it.

    Args:
        factors: λ, d/2 positive numbers; 1 leaves a dimension as it was.
        rope_theta: θ, the base of the unscaled frequencies.
        original_max_position_embeddings: tokens the model handles unscaled (L).
        max_position_embeddings: tokens the rescale is made for.
        attention_factor: what cos and sin are multiplied by, from ``start_tokens`` on.
        start_tokens: n̂, the number of first positions that stay as they were.
        provenance: how it came about; any JSON object.

    Raises:
        ValueError: a field is out of range; the message names it and its value.
    """

    factors: tuple[float, ...]
    rope_theta: float
    original_max_position_embeddings: int
    max_position_embeddings: int
    attention_factor: float = 1.0
    start_tokens: int = 0
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", tuple(float(f) for f in self.factors))
        if not self.factors:
            raise ValueError("factors is empty; give one number per pair of rotary dimensions")
        for i, factor in enumerate(self.factors):
            if not (math.isfinite(factor) and factor > 0):
                raise ValueError(f"factors[{i}] is {factor}; a factor is a positive finite number")
        for name in ("rope_theta", "attention_factor"):
            value = getattr(self, name)
            if not (_is_number(value) and math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value!r}; it must be a positive finite number")
        for name, least in (
            ("original_max_position_embeddings", 1),
            ("max_position_embeddings", self.original_max_position_embeddings),
            ("start_tokens", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(
                    f"{name} is {value!r}; it must be a whole number of at least {least}"
                )

    @property
    def rotary_dim(self) -> int:
        """d: the number of rotated dimensions of a head."""
        return 2 * len(self.factors)

    @property
    def turning(self) -> int:
        """How many factors, from the first on, are of dimensions that the model turns."""
        return sum(factor < UNTURNED / 10 for factor in self.factors)

    @property
    def scale(self) -> float:
        """s: how many times the original length."""
        return self.max_position_embeddings / self.original_max_position_embeddings

    @property
    def portable(self) -> bool:
        """Whether engines can load it: no format has a field for ``start_tokens``."""
        return self.start_tokens == 0

    @property
    def inv_freq(self) -> np.ndarray:
        """Rescaled frequencies in radians per token, shape (d/2,), float64."""
        return default_inv_freq(self.rope_theta, self.rotary_dim) / np.asarray(self.factors)

    def replace(self, **changes: Any) -> "Rescale":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """The JSON object that :meth:`save` writes; field names are transformers' own."""
        return {"schema": SCHEMA} | {
            field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)
        }

    @classmethod
    def from_json(cls, data: Any) -> "Rescale":
        """Read what :meth:`to_json` gave.

        Raises:
            ValueError: not a JSON object, another schema, or a key unknown or missing.
        """
        if not isinstance(data, dict):
            raise ValueError("a rescale is a JSON object; this is something else")
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in ("schema", *names) if name not in data]
        if missing:
            raise ValueError(f"a rescale needs the key {missing[0]!r}, which is missing")
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema is {data['schema']!r}; this longrope reads schema {SCHEMA}")
        unknown = sorted(set(data) - {"schema", *names})
        if unknown:
            raise ValueError(f"a rescale has no key {unknown[0]!r}; it has {', '.join(names)}")
        if not isinstance(data["factors"], list) or not all(map(_is_number, data["factors"])):
            raise ValueError("factors must be a list of numbers")
        if not isinstance(data["provenance"], dict):
            raise ValueError("provenance must be a JSON object")
        return cls(**{name: data[name] for name in names})

    def save(self, path: str | Path) -> None:
        """Write the JSON file, atomically."""
        write_atomically(Path(path), json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Rescale":
        """Read a JSON file.

        Raises:
            ValueError: no such file, not JSON, or not a rescale.
        """
        path = Path(path)
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; give the path of a rescale file") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not a JSON text file") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON ({error})") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_csv(
        cls,
        path: str | Path,
        *,
        rope_theta: float,
        original_max_position_embeddings: int,
        max_position_embeddings: int,
        attention_factor: float | None = None,
    ) -> "Rescale":
        """Read factors in the form of the authors' repository: one row, or one per layer.

        ``attention_factor`` defaults to :func:`default_attention_factor`.

        Raises:
            ValueError: not numbers, ragged, or rows that differ between layers.
        """
        path = Path(path)
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = [[float(cell) for cell in row if cell.strip()] for row in csv.reader(file)]
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{path}: not a table of numbers ({error})") from None
        rows = [row for row in rows if row]
        if not rows:
            raise ValueError(f"{path}: no numbers in it")
        for layer, row in enumerate(rows):
            if row != rows[0]:
                raise ValueError(
                    f"{path}: row {layer + 1} differs from row 1; one set of factors must serve "
                    "every layer, because no inference engine can apply a set per layer"
                )
        if attention_factor is None:
            attention_factor = default_attention_factor(
                original_max_position_embeddings, max_position_embeddings
            )
        return cls(
            factors=tuple(rows[0]),
            rope_theta=rope_theta,
            original_max_position_embeddings=original_max_position_embeddings,
            max_position_embeddings=max_position_embeddings,
            attention_factor=attention_factor,
            provenance={"method": "csv", "file": path.name},
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(value)
    return value


def load_rescale(name: str, unscaled: Rescale) -> Rescale:
    """Load a rescale from its JSON file, or from the LongRoPE authors' CSV.

    Args:
        unscaled: the rescale that is no extension, with the target as its length. A CSV file
            holds factors alone; ``rope_theta`` and the lengths come from here.

    Raises:
        ValueError: no such file, or not a rescale.
    """
    if not Path(name).is_file():
        raise ValueError(f"{name!r} is neither a rescale file nor a known method, such as yarn")
    if Path(name).suffix != ".csv":
        return Rescale.load(name)
    return Rescale.from_csv(
        name,
        rope_theta=unscaled.rope_theta,
        original_max_position_embeddings=unscaled.original_max_position_embeddings,
        max_position_embeddings=unscaled.max_position_embeddings,
    )
