"""The :class:`Rescale` value: factors of a non-uniformly rescaled RoPE, as JSON or CSV."""

import csv
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longrope.errors import shortened
from longrope.files.atomic import write_atomically
from longrope.files.parse import read_json
from longrope.rope.parameters import kept_parameters
from longrope.units import LONGEST

SCHEMA = 1
# Some models rotate only some of their dimensions; the others have frequency 0 (Gemma 4). As a
# factor, that is one so large that nothing rotates.
UNROTATED = 1e30
_LARGEST_FACTOR = 1e36  # inverse frequencies are float32 in every engine


def default_inv_freq(rope_theta: float, rotary_dim: int) -> np.ndarray:
    """Return the unscaled frequencies θ^(−2i/d), which a rescale divides, in radians per token.

    Shape (d/2,), float64.
    """
    return rope_theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim)


def default_attention_factor(original: int, target: int) -> float:
    """Return the default attention factor of a rescale, √(1 + ln s / ln L), as in engines.

    Inference engines compute it if a config has none. It multiplies cosines and sines, so attention
    scores grow by its square. It comes from the Phi-3 models and is not in the LongRoPE paper.

    Args:
        original: original length L in tokens.
        target: target length in tokens; s = target / L.
    """
    scale = target / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class Rescale:
    """A non-uniform rescale of RoPE (LongRoPE eq. 3).

    Pair i of a rotary dimension d is rotated by ``position · θ^(−2i/d) / factors[i]`` from position
    ``start_tokens`` on, and by the original angle before it.

    Args:
        factors: λ, d/2 positive numbers; 1 leaves a dimension unscaled.
        rope_theta: θ, the base of the unscaled frequencies.
        original_max_position_embeddings: L, the length in tokens that the model supports unscaled.
        max_position_embeddings: the length in tokens that the rescale is made for.
        attention_factor: multiplies cosines and sines, from ``start_tokens`` on.
        start_tokens: n̂, the number of first positions that keep their original angles.
        base_factors: factors of the model's own scaling, where the rescale is made on top of them;
            ``factors`` include them. Empty on an unscaled model.
        searched_documents: SHA-256 of the documents that a search used; comparisons leave them out.
        provenance: where the factors come from, for people; any JSON object. Nothing depends on it.

    Rescales are equal if they are applied alike: the last three fields do not count.

    Raises:
        ValueError: a field is out of range; the message names it and its value.
    """

    factors: tuple[float, ...]
    rope_theta: float
    original_max_position_embeddings: int
    max_position_embeddings: int
    attention_factor: float = 1.0
    start_tokens: int = 0
    base_factors: tuple[float, ...] = dataclasses.field(default=(), compare=False)
    searched_documents: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name in ("factors", "base_factors"):
            numbers = tuple(float(factor) for factor in getattr(self, name))
            object.__setattr__(self, name, numbers)
            for i, factor in enumerate(numbers):
                if not 1 / _LARGEST_FACTOR < factor < _LARGEST_FACTOR:
                    raise ValueError(
                        f"{name}[{i}] is {factor}; a factor is a positive finite number (at most "
                        f"{_LARGEST_FACTOR:g}, as engines compute in float32)"
                    )
        object.__setattr__(self, "searched_documents", tuple(self.searched_documents))
        if not self.factors:
            raise ValueError("factors is empty: pass one number per pair of rotary dimensions")
        if len(self.base_factors) not in (0, len(self.factors)):
            raise ValueError(
                f"base_factors has {len(self.base_factors)} numbers; it must have as many as "
                f"factors, {len(self.factors)}, or none"
            )
        for name in ("rope_theta", "attention_factor"):
            value = getattr(self, name)
            if not (_is_number(value) and 1 / _LARGEST_FACTOR < value < _LARGEST_FACTOR):
                raise ValueError(
                    f"{name} is {shortened(value)}; it must be a positive finite number (at most "
                    f"{_LARGEST_FACTOR:g})"
                )
        for name, least in (
            ("original_max_position_embeddings", 1),
            ("max_position_embeddings", self.original_max_position_embeddings),
            ("start_tokens", 0),
        ):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= LONGEST:
                raise ValueError(
                    f"{name} is {shortened(value)}; it must be a whole number of at least {least}"
                    f"{f' and at most {LONGEST:,}' if type(value) is int and value > least else ''}"
                )

    @property
    def rotary_dim(self) -> int:
        """The rescale's rotary dimension d, twice its number of factors."""
        return 2 * len(self.factors)

    @property
    def rotated(self) -> int:
        """Number of leading factors of the rescale whose dimensions the model rotates."""
        return sum(factor < UNROTATED / 10 for factor in self.factors)

    @property
    def scale(self) -> float:
        """The rescale's s: target length over original length."""
        return self.max_position_embeddings / self.original_max_position_embeddings

    @property
    def portable(self) -> bool:
        """Whether inference engines can load the rescale: no format supports ``start_tokens``."""
        return self.start_tokens == 0

    @property
    def inv_freq(self) -> np.ndarray:
        """The rescaled frequencies in radians per token, shape (d/2,), float64."""
        return default_inv_freq(self.rope_theta, self.rotary_dim) / np.asarray(self.factors)

    def replace(self, **changes: Any) -> "Rescale":
        """Return a copy of the rescale with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Return the rescale as the JSON object that :meth:`save` writes.

        Field names are transformers' own.
        """
        return {"schema": SCHEMA} | {
            field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)
        }

    def to_hf(self, config: Any) -> dict[str, Any]:
        """Return the ``rope_parameters`` that apply the rescale at every length in transformers 5.

        Args:
            config: the model's config, with its own RoPE parameters.

        Raises:
            ValueError: start tokens, which no config can express, or a model with RoPE parameters
                per layer type, which ``longrope.export`` writes.

        Example:
            >>> import longrope
            >>> loaded = longrope.load_model("bundled")
            >>> yarn = longrope.methods.yarn(loaded.info, target_length="8x")
            >>> yarn.to_hf(loaded.model.config)["rope_type"]
            'longrope'
        """
        if self.start_tokens:
            raise ValueError(
                f"start_tokens is {self.start_tokens}, which no config can express: use the "
                "portable rescale of the search"
            )
        own = config.get_text_config().rope_parameters
        if own.get("rope_type", "default") == "proportional" or "rope_theta" not in own:
            raise ValueError(
                "config has RoPE parameters that one set of factors does not cover: use "
                "longrope.export"
            )
        return kept_parameters({"rope_type": "default"} | own) | {
            "rope_type": "longrope",
            "rope_theta": self.rope_theta,
            "short_factor": list(self.factors),
            "long_factor": list(self.factors),
            "original_max_position_embeddings": self.original_max_position_embeddings,
            "factor": self.scale,
            "attention_factor": self.attention_factor,
        }

    def applied(self) -> dict[str, Any]:
        """Return the part of the rescale's JSON object that decides how it is applied."""
        return {"schema": SCHEMA} | {
            field.name: _plain(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.compare
        }

    @classmethod
    def from_json(cls, data: Any) -> "Rescale":
        """Read a rescale from the JSON object that :meth:`to_json` returns.

        Keys that :meth:`applied` leaves out may be missing.

        Raises:
            ValueError: not a JSON object, another schema, or a key unknown or missing.
        """
        if not isinstance(data, dict):
            raise ValueError("a rescale must be a JSON object")
        names = [field.name for field in dataclasses.fields(cls)]
        needed = [field.name for field in dataclasses.fields(cls) if field.compare]
        missing = [name for name in ("schema", *needed) if name not in data]
        if missing:
            raise ValueError(f"a rescale needs the key {missing[0]!r}, which is missing")
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema is {data['schema']!r}; this longrope reads schema {SCHEMA}")
        unknown = sorted(set(data) - {"schema", *names})
        if unknown:
            raise ValueError(f"a rescale has no key {unknown[0]!r}; it has {', '.join(names)}")
        provenance = data.get("provenance", {})
        if not isinstance(provenance, dict):
            raise ValueError("provenance must be a JSON object")
        # Files of older versions hold these two in their provenance.
        old = {"base_factors": "base_factors", "searched_documents": "documents"}
        data = {
            name: known if isinstance(known := provenance.get(key), list) else []
            for name, key in old.items()
        } | data
        for name in ("factors", "base_factors"):
            if not isinstance(data[name], list) or not all(map(_is_number, data[name])):
                raise ValueError(f"{name} must be a list of numbers")
        documents = data["searched_documents"]
        if not isinstance(documents, list) or not all(isinstance(d, str) for d in documents):
            raise ValueError("searched_documents must be a list of strings")
        return cls(**{name: data[name] for name in names if name in data})

    def save(self, path: str | Path) -> None:
        """Write the rescale to a JSON file, atomically."""
        write_atomically(Path(path), json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Rescale":
        """Read a rescale from a JSON file.

        Raises:
            ValueError: the file is missing, not JSON, or not a rescale.
        """
        path = Path(path)
        try:
            return cls.from_json(read_json(path))
        except ValueError as error:
            known = str(error).startswith(str(path))
            raise ValueError(str(error) if known else f"{path}: {error}") from None

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
        """Read a rescale from the LongRoPE authors' CSV format: one row, or one per layer.

        Args:
            path: of the CSV file.
            rope_theta: of the model.
            original_max_position_embeddings: original length in tokens.
            max_position_embeddings: target length in tokens.
            attention_factor: default :func:`default_attention_factor`.

        Raises:
            ValueError: the file is missing, not numeric, or its rows differ.
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
            raise ValueError(f"{path}: contains no numbers")
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
        name: path of the file.
        unscaled: the identity rescale, with the target as its length. A CSV file holds factors
            only; ``rope_theta`` and the lengths are taken from here.

    Raises:
        ValueError: the file is missing, or not a rescale.
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
