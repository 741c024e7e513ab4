"""Recognise the directory of a `longrope extend` run."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from longrope.files.atomic import write_atomically
from longrope.files.parse import content_of, read_json, read_yaml

_PAIR = "pair.json"


class _Pair(TypedDict):
    short_attention_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None


def original_of(source: str) -> dict[str, Any] | None:
    """Return the model that a run directory extended, as arguments of ``load_model``.

    None if ``source`` is no run directory. ``trust_remote_code`` is left out: the user decides on
    it again.
    """
    recipe = Path(source) / "recipe.yaml"
    if not (is_run(Path(source)) and recipe.exists()):
        return None
    found = read_yaml(recipe)
    with content_of(recipe, "restore it, or extend again"):
        return {
            "source": str(found["model"]),
            # Runs of older versions have another name for it.
            "rope_scaling": found.get("rope_scaling", found.get("existing_scaling")),
            "original_length": found["original_length"],
        }


def is_run(path: Path) -> bool:
    """Return whether a path is a run directory of ``longrope extend`` with an exported model."""
    return all((path / name).exists() for name in ("model", "rescale.json", "short.json"))


def save_short_attention_factor(run: Path, factor: float | None) -> None:
    """Write the attention factor for short sequences to a run directory; None if it has none."""
    content = json.dumps({"short_attention_factor": factor}, indent=1) + "\n"
    write_atomically(run / _PAIR, content)


def short_attention_factor(run: Path) -> float | None:
    """Read the attention factor for short sequences from a run directory; None if it has none."""
    file = run / _PAIR
    if not file.exists():
        return None
    return read_json(file, _Pair)["short_attention_factor"]
