"""What is known of a model before any of its weights is read."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig

from longrope.attention.config import attention_shape, explicit_scores
from longrope.models.meta import RESCALABLE, build_meta_model, unscaled
from longrope.models.parameters import active_parameters, is_tied
from longrope.models.sources import read_pretrained, refuse_scaled_gguf, says
from longrope.progress import quiet
from longrope.rope.methods import METHODS, dynamic_ntk
from longrope.rope.rescale import Rescale
from longrope.rope.rotary import (
    UNSCALED,
    RotarySite,
    boundary_of,
    existing_factors,
    scaled_length,
    unscaled_factors,
)

Existing = Literal["keep", "replace"]


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What is known of a model before any weight is read.

    ``reason`` is None where longrope can extend the model. ``base_factors`` and
    ``base_attention_factor`` are the scaling that an extension starts from: ones,
    or the model's own where that is kept. ``attention_layers`` have keys, where others go on from
    a state; ``active_parameters`` are those that each token meets, of experts some; ``head_dim`` is
    the mean of a key's and a value's; ``kv_numbers`` are a token's in one layer of each shape,
    which the long forward holds. ``sliding_layers`` of the attention layers see ``sliding_window``
    tokens and no more. ``boundary``: where the long factors of a checkpoint must begin,
    if the model itself counts in that length. ``explicit_scores``: transformers has no fused
    attention for it, and training goes through ours (as it does under a sliding window).
    """

    source: str
    architecture: str
    layers: int
    attention_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int | None
    rope_theta: float | None
    original_max_position_embeddings: int | None
    original_read_from: str | None
    existing_scaling: dict[str, Any] | None
    dtype: str
    parameters: int
    active_parameters: int
    kv_numbers: int
    kv_bytes_per_token: int
    vocabulary: int
    hidden_size: int
    tied: bool
    extendable: bool
    reason: str | None
    base_factors: tuple[float, ...] = ()
    base_attention_factor: float = 1.0
    quantized: bool = False
    boundary: int | None = None
    explicit_scores: bool = False
    sliding_layers: int = 0
    sliding_window: int | None = None

    @property
    def name(self) -> str:
        """What the model may be called in what is published: without a machine's folders."""
        path = Path(self.source)
        return path.name if path.exists() else self.source

    def check_representable(self, existing: Existing | None, boundary: int) -> None:
        """Refuse an extension that no checkpoint could say.

        Args:
            existing: what was done with scaling that is there.
            boundary: up to where short factors apply.

        Raises:
            ValueError: says what of the model would be lost.
        """
        if self.boundary not in (None, boundary):
            raise ValueError(
                f"{self.source}: its scores grow with the position in units of "
                f"original_max_position_embeddings ({self.boundary:,}), where a checkpoint says up "
                f"to where short factors apply ({boundary:,}): these must be the same, as they are "
                "with --existing-scaling replace and no --original-length"
            )
        if existing != "replace" and (self.existing_scaling or {}).get("mscale_all_dim"):
            raise ValueError(
                f"{self.source}: its scaling multiplies all scores (mscale_all_dim), which no "
                "checkpoint with longrope factors can say; search again with --existing-scaling "
                "replace, which starts over without it"
            )

    def rescale(self, method: str, target: int, length: int | None = None) -> Rescale:
        """A known method for this model, on top of the scaling that is kept.

        ``length`` is the sequence's, which dynamic NTK depends on.

        Raises:
            ValueError: no such method, or a target below the original length.
        """
        if method not in METHODS:
            raise ValueError(f"no method {method!r}; there are {', '.join(METHODS)}")
        assert self.rope_theta and self.rotary_dim and self.original_max_position_embeddings
        original = self.original_max_position_embeddings
        shape = (self.rope_theta, self.rotary_dim, original, max(target, original))
        if method == "dynamic-ntk":
            rescale = dynamic_ntk(*shape, length=length)
        else:
            rescale = METHODS[method](*shape)
        return rescale.replace(
            factors=tuple(np.multiply(rescale.factors, self.base_factors)),
            attention_factor=rescale.attention_factor * self.base_attention_factor,
        )

    def forward_flops(self, length: int) -> tuple[float, float]:
        """Of one forward of a window: in matrix products with weights, and in attention.

        Two per weight and token (the embedding table is read, not multiplied, unless it is
        the head too); attention 4 · heads · head_dim per layer and pair of tokens, of which a
        causal model sees half, and a sliding window those in its reach (its layers are taken for
        as large as the others). States, which layers have in its place, are not counted.
        """
        multiplied = self.active_parameters
        multiplied -= 0 if self.tied else self.vocabulary * self.hidden_size
        hidden = self.sliding_layers * max(0, length - (self.sliding_window or length)) ** 2
        pairs = (self.attention_layers * length * length - hidden) / 2
        return 2.0 * multiplied * length, 4.0 * self.heads * self.head_dim * pairs


def inspect_model(
    source: str,
    *,
    existing_scaling: Existing | None = None,
    original_length: int | None = None,
    trust_remote_code: bool = False,
) -> ModelInfo:
    """Facts of a model from its config alone; nothing of its weights is read.

    ``source`` is a local directory, a hub id, a GGUF file or ``"bundled"``.
    ``original_length`` overrides the one read from the config.

    Raises:
        ValueError: there is no such model, or its config is not one transformers knows.
    """
    if existing_scaling not in (None, "keep", "replace"):
        raise ValueError(f"existing_scaling is {existing_scaling!r}; choose keep or replace")
    if existing_scaling != "replace" or original_length is None:
        refuse_scaled_gguf(source)
    with quiet():
        config = read_pretrained(AutoConfig, source, trust_remote_code)
        model, site, reason = build_meta_model(source, config, trust_remote_code)
        scaled = site is not None and site.rope_type not in UNSCALED
        scaling = site.parameters if site and scaled else None
        if site and scaling and site.rope_type in RESCALABLE and existing_scaling == "replace":
            config = unscaled(config, site.layer_type)
            model, site, reason = build_meta_model(source, config, trust_remote_code)
    try:
        info = _info(source, model, config, site, scaling, reason)
    except Exception as error:  # a kind of its own: layers of different shapes
        raise ValueError(
            f"{source}: its config is of a kind that cannot be read ({error})"
        ) from error
    if site is None:
        return info
    return _with_base(info, site, config, existing_scaling, original_length)


def _info(
    source: str,
    model: nn.Module,
    config: Any,
    site: RotarySite | None,
    scaling: dict[str, Any] | None,
    reason: str | None,
) -> ModelInfo:
    text = config.get_text_config()
    shape = attention_shape(text)
    dtype = getattr(config, "dtype", None) or torch.float32
    return ModelInfo(
        source=source,
        architecture=type(model).__name__,
        layers=text.num_hidden_layers,
        attention_layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rotary_dim=2 * len(site.inv_freq) if site else None,
        rope_theta=float(site.parameters["rope_theta"]) if site else None,
        original_max_position_embeddings=None,
        original_read_from=None,
        existing_scaling=scaling,
        dtype=str(dtype).removeprefix("torch."),
        parameters=sum(p.numel() for p in model.parameters()),
        kv_numbers=shape.kv_numbers,
        active_parameters=active_parameters(model, text),
        kv_bytes_per_token=2 * shape.layers * shape.kv_heads * shape.head_dim * dtype.itemsize,
        vocabulary=text.vocab_size,
        hidden_size=text.hidden_size,
        tied=is_tied(model),
        extendable=reason is None,
        reason=reason,
        quantized=getattr(config, "quantization_config", None) is not None,
        boundary=boundary_of(site) if site else None,
        explicit_scores=explicit_scores(site.owner.config if site else model.config),
        sliding_layers=shape.sliding_layers,
        sliding_window=shape.sliding_window,
    )


def _with_base(
    info: ModelInfo,
    site: RotarySite,
    config: Any,
    existing: Existing | None,
    original_length: int | None,
) -> ModelInfo:
    """Settle what counts as the original length, and the scaling to start from."""
    text, read_from = config.get_text_config(), "max_position_embeddings"
    original = getattr(text, read_from, None)
    if not says(info.source, text, read_from):
        read_from = f"the default of {type(text).__name__}: its config.json does not say"
    factors, attention_factor, reason = unscaled_factors(site), 1.0, info.reason
    scaling = info.existing_scaling
    kind = scaling and scaling["rope_type"]
    longest = scaled_length(scaling, original) if scaling and original else original
    if scaling and existing == "keep":
        factors, attention_factor = existing_factors(site), site.attention_factor
        if longest != original:
            original, read_from = longest, f"its {kind} scaling"
        if kind == "dynamic":
            reason = reason or (
                "its dynamic scaling changes with the length and cannot be kept; use "
                "--existing-scaling replace"
            )
    elif scaling and "original_max_position_embeddings" in scaling:
        original = scaling["original_max_position_embeddings"]
        read_from = "rope_parameters.original_max_position_embeddings"
    if original_length is not None:
        original, read_from = original_length, "--original-length"
    elif kind == "linear" and existing == "replace":
        reason = reason or (
            "its config does not say how long it was before its linear scaling by "
            f"{scaling['factor']:g}; give --original-length"  # type: ignore[index]
        )
    if original is None:
        reason = (
            reason or "its config does not say how many tokens it handles; give --original-length"
        )
    if scaling and existing is None and reason is None:
        reason = _undecided(str(kind), longest)
    return dataclasses.replace(
        info,
        original_max_position_embeddings=original,
        original_read_from=read_from,
        base_factors=tuple(factors.tolist()),
        base_attention_factor=attention_factor,
        extendable=reason is None,
        reason=reason,
    )


def _undecided(kind: str, longest: int | None) -> str:
    keep = (
        f"--existing-scaling keep (extend from its scaled length, {longest:,}, on top of its "
        "factors) or "
    )
    return (
        f"it already has {kind!r} scaling: choose {'' if kind == 'dynamic' else keep}"
        "--existing-scaling replace (start over, unscaled)"
    )
