"""Differences between versions of transformers."""

import inspect
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
)


def cache_name(module: nn.Module) -> str:
    """What a model's forward calls its cache, and its output too.

    ``cache`` since transformers 5.24, ``past_key_values`` before and in models of other
    people's code.
    """
    known = inspect.signature(module.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def auto_class(config: Any) -> Any:
    """What transformers loads a model of this kind with; many for pictures are no causal ones."""
    # A look brings the kind's code in, which the meta device must not be around.
    if MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is not None:
        return AutoModelForCausalLM
    if MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(config), None) is not None:
        return AutoModelForMultimodalLM
    return AutoModelForCausalLM  # other people's code, or an error that names the kind
