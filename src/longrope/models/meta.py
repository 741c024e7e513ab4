"""Build a model without weights, on the meta device, and find its rotary embedding."""

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from longrope.compat import auto_class
from longrope.layerwise.decoder import find_layers
from longrope.models.config_check import rope_fault
from longrope.rope.rotary import RotarySite, column_layout, find_rotary, unscaled_parameters

RESCALABLE = ("default", "proportional", "linear", "dynamic", "yarn", "llama3", "longrope")


def unscaled(config: Any, layer_type: str | None) -> Any:
    """Copy a model's config without its RoPE scaling, to build the unscaled model.

    Args:
        layer_type: whose RoPE parameters to change, where the config has a set per layer type.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    scaled = text.rope_parameters if layer_type is None else text.rope_parameters[layer_type]
    plain = unscaled_parameters(scaled)
    if layer_type is None:
        text.rope_parameters = plain
    else:
        text.rope_parameters = text.rope_parameters | {layer_type: plain}
    return config


def build_meta_model(
    source: str, config: Any, trust_remote_code: bool, kind: type | None = None
) -> tuple[nn.Module, RotarySite | None, str | None]:
    """Build a model on the meta device, and find its rotary embedding.

    Args:
        kind: the model's class; None leaves the choice to transformers.

    Returns:
        The model, and what :func:`find_rescalable` returns for it.

    Raises:
        ValueError: transformers cannot build a causal language model from the config.
    """
    try:
        auto = auto_class(config)  # imports the model's code, not under the meta device
        with torch.device("meta"):
            if kind is not None:
                model = kind(config)
            else:
                model = auto.from_config(config, trust_remote_code=trust_remote_code)
        return model, *find_rescalable(model)
    except Exception as error:  # configs of dozens of kinds fail in ways of their own
        if fault := rope_fault(config):
            raise ValueError(f"{source}: {fault}") from error
        if isinstance(error, ValueError):
            raise ValueError(
                f"{source}: a {config.model_type!r} model is not a causal language model"
            ) from None
        raise ValueError(
            f"{source}: a {config.model_type!r} model cannot be made from its config "
            f"({type(error).__name__}: {error})"
        ) from error


def find_rescalable(
    model: nn.Module, *, replace_scaling: bool = False
) -> tuple[RotarySite | None, str | None]:
    """Find the rotary embedding of a model on the meta device, with real frequencies.

    Args:
        replace_scaling: take the embedding as it is without the scaling in the config.

    Returns:
        The rotary site (None without RoPE), and why it cannot be rescaled (None if it can).
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    site = find_rotary(model)
    if site is None:
        rotary = [
            k for k in ("rope_parameters", "rotary_dim", "rope_theta") if getattr(config, k, None)
        ]
        if rotary:
            return (
                None,
                f"its kind of rotary embedding is not one longrope can rescale ({rotary[0]})",
            )
        return None, "it has no rotary position embedding (RoPE)"
    try:
        with torch.device("cpu"):  # the meta model's frequencies have no values
            own = site.module.config
            if replace_scaling:
                own = unscaled(own, site.layer_type)
            module = type(site.module)(config=own)
    except Exception as error:
        kind = type(site.module).__name__
        return None, f"{kind} cannot be rescaled: it is not made from a config alone ({error})"
    site = dataclasses.replace(site, module=module)
    if site.rope_type not in RESCALABLE:
        return site, f"its rotary embedding is of type {site.rope_type!r}, which cannot be rescaled"
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return site, "some of its layers see chunks of a text, which only a mask says"
    try:
        column_layout(site)
        find_layers(model)
    except ValueError as error:
        return site, str(error)
    return site, None
