"""Extend the context window of any RoPE language model, as LongRoPE does, and further.

The public names, imported when first used::

    from longrope import Rescale, installed, load_model

    loaded = load_model("bundled")
    with installed(loaded.model, Rescale.load("out/rescale.json")):
        loaded.model(**inputs)
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "LoadedModel": "longrope.model",
    "LongForward": "longrope.forward",
    "ModelFacts": "longrope.facts",
    "Pair": "longrope.rope.switch",
    "Rescale": "longrope.rope.rescale",
    "SearchOptions": "longrope.search.stage",
    "inspect_model": "longrope.facts",
    "installed": "longrope.rope.install",
    "load_extended": "longrope.generate",
    "load_model": "longrope.model",
    "search_factors": "longrope.search.stage",
    "switched": "longrope.rope.switch",
}
__all__ = [
    "LoadedModel",
    "LongForward",
    "ModelFacts",
    "Pair",
    "Rescale",
    "SearchOptions",
    "__version__",
    "inspect_model",
    "installed",
    "load_extended",
    "load_model",
    "search_factors",
    "switched",
]

if TYPE_CHECKING:
    from longrope.facts import ModelFacts, inspect_model
    from longrope.forward import LongForward
    from longrope.generate import load_extended
    from longrope.model import LoadedModel, load_model
    from longrope.rope.install import installed
    from longrope.rope.rescale import Rescale
    from longrope.rope.switch import Pair, switched
    from longrope.search.stage import SearchOptions, search_factors


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'longrope' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
