"""Extend the context window of any RoPE language model, as LongRoPE does, and further.

The public names, imported when first used::

    from longrope import Rescale, load_model, rescaled

    loaded = load_model("bundled")
    with rescaled(loaded.model, Rescale.load("out/rescale.json")):
        loaded.model(**inputs)
"""

import importlib
from typing import TYPE_CHECKING, Any

from longrope.version import __version__

_HOMES = {
    "LoadedModel": "longrope.models.load",
    "LongForward": "longrope.layerwise.forward",
    "ModelInfo": "longrope.models.info",
    "RescalePair": "longrope.rope.pair",
    "Rescale": "longrope.rope.rescale",
    "SearchOptions": "longrope.search.run",
    "inspect_model": "longrope.models.info",
    "rescaled": "longrope.rope.apply",
    "load_extended": "longrope.inference.load",
    "load_model": "longrope.models.load",
    "search_factors": "longrope.search.run",
    "switched": "longrope.rope.switch",
}
__all__ = [
    "LoadedModel",
    "LongForward",
    "ModelInfo",
    "Rescale",
    "RescalePair",
    "SearchOptions",
    "__version__",
    "inspect_model",
    "load_extended",
    "load_model",
    "rescaled",
    "search_factors",
    "switched",
]

if TYPE_CHECKING:
    from longrope.inference.load import load_extended
    from longrope.layerwise.forward import LongForward
    from longrope.models.info import ModelInfo, inspect_model
    from longrope.models.load import LoadedModel, load_model
    from longrope.rope.apply import rescaled
    from longrope.rope.pair import RescalePair
    from longrope.rope.rescale import Rescale
    from longrope.rope.switch import switched
    from longrope.search.run import SearchOptions, search_factors


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'longrope' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
