"""Recognise the directory of a `longrope extend` run."""

from pathlib import Path
from typing import Any

import yaml


def original_of(source: str) -> dict[str, Any] | None:
    """The model that a run of ``longrope extend`` began with, as ``load_model`` takes it.

    None for anything else. Whether to trust its code is for whoever runs it to say again.
    """
    recipe = Path(source) / "recipe.yaml"
    if not (is_run(Path(source)) and recipe.exists()):
        return None
    found = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    return {
        "source": found["model"],
        "existing_scaling": found["existing_scaling"],
        "original_length": found["original_length"],
    }


def is_run(path: Path) -> bool:
    """Whether ``longrope extend`` wrote there, as far as its export."""
    return all((path / name).exists() for name in ("model", "rescale.json", "short.json"))
