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
    """Return the name of a model's cache argument, which differs between transformers versions.

    ``cache`` since transformers 5.24; ``past_key_values`` before, and in custom model code.
    """
    known = inspect.signature(module.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def auto_class(config: Any) -> Any:
    """Return the auto class that this version of transformers loads a config with.

    Many multimodal models are not registered as causal language models.
    """
    # The lookup imports the model's code, which must not happen under the meta device.
    if MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is not None:
        return AutoModelForCausalLM
    if MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(config), None) is not None:
        return AutoModelForMultimodalLM
    return AutoModelForCausalLM  # custom code, or its error names the model type
