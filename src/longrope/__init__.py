"""Extend the context window of any RoPE language model, as LongRoPE does, and further.

The public names, imported when first used::

    import longrope

    result = longrope.search_factors(
        model, tokenizer, target_length="8x", texts=texts, output_dir="runs/first"
    )
    with longrope.rescaled(model, result.best):
        model.generate(**inputs)
"""

import importlib
from typing import TYPE_CHECKING, Any

from longrope.version import __version__

_HOMES = {
    "EvolutionSearchConfig": "longrope.search.settings",
    "ExecutionConfig": "longrope.execution",
    "GradientSearchConfig": "longrope.search.settings",
    "LoadedModel": "longrope.models.load",
    "LongForward": "longrope.layerwise.forward",
    "ModelInfo": "longrope.models.info",
    "Recipe": "longrope.pipeline.recipe",
    "Rescale": "longrope.rope.rescale",
    "RescalePair": "longrope.rope.pair",
    "apply_rescale": "longrope.rope.apply",
    "export": "longrope.api",
    "extend": "longrope.api",
    "from_pretrained": "longrope.api",
    "inspect_model": "longrope.models.info",
    "load_extended": "longrope.inference.load",
    "load_model": "longrope.models.load",
    "perplexity": "longrope.api",
    "remove_rescale": "longrope.rope.apply",
    "rescaled": "longrope.rope.apply",
    "search_factors": "longrope.api",
    "switched": "longrope.rope.switch",
    "token_losses": "longrope.api",
    "verify": "longrope.api",
}
__all__ = [
    "EvolutionSearchConfig",
    "ExecutionConfig",
    "GradientSearchConfig",
    "LoadedModel",
    "LongForward",
    "ModelInfo",
    "Recipe",
    "Rescale",
    "RescalePair",
    "__version__",
    "apply_rescale",
    "export",
    "extend",
    "from_pretrained",
    "inspect_model",
    "load_extended",
    "load_model",
    "methods",
    "perplexity",
    "remove_rescale",
    "rescaled",
    "search_factors",
    "switched",
    "token_losses",
    "verify",
]

if TYPE_CHECKING:
    from longrope import methods
    from longrope.api import (
        export,
        extend,
        from_pretrained,
        perplexity,
        search_factors,
        token_losses,
        verify,
    )
    from longrope.execution import ExecutionConfig
    from longrope.inference.load import load_extended
    from longrope.layerwise.forward import LongForward
    from longrope.models.info import ModelInfo, inspect_model
    from longrope.models.load import LoadedModel, load_model
    from longrope.pipeline.recipe import Recipe
    from longrope.rope.apply import apply_rescale, remove_rescale, rescaled
    from longrope.rope.pair import RescalePair
    from longrope.rope.rescale import Rescale
    from longrope.rope.switch import switched
    from longrope.search.settings import EvolutionSearchConfig, GradientSearchConfig


def __getattr__(name: str) -> Any:
    if name == "methods":
        return importlib.import_module("longrope.methods")
    if name not in _HOMES:
        raise AttributeError(f"module 'longrope' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
