"""Inspect a model from its config: shape, RoPE, original length, whether it can be extended."""

import copy
import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from longrope.attention.shape import attention_shape, explicit_scores
from longrope.files.parse import read_json
from longrope.labels import display_name
from longrope.models.meta import RESCALABLE, build_meta_model, find_rescalable, unscaled
from longrope.models.parameters import active_parameters, is_tied
from longrope.models.sources import is_in_config_file, read_pretrained, refuse_scaled_gguf
from longrope.progress import quiet
from longrope.rope.methods import METHODS, dynamic_ntk
from longrope.rope.parameters import ignored_scaling
from longrope.rope.rescale import Rescale
from longrope.rope.rotary import (
    UNSCALED,
    RotarySite,
    boundary_of,
    existing_factors,
    scaled_length,
    unscaled_factors,
)
from longrope.units import LONGEST

ScalingChoice = Literal["keep", "replace"]
# Why an export with changed weights cannot be extended anew.
FOLDED = "an attention factor is folded into its weights; give the model that it was exported from"
_LENGTH = "max_position_embeddings"


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """Facts about a model, read from its config without any weights.

    Args:
        source: the directory, hub id, GGUF file or ``"bundled"`` that was inspected.
        attention_layers: layers with attention; the others are recurrent (state-space and such).
        head_dim: mean of the key and value dimensions of a head.
        original_max_position_embeddings: tokens that the model handles before an extension.
        original_read_from: the config field or parameter that this length was read from.
        rope_scaling: RoPE parameters of the scaling that the config has, if any.
        active_parameters: parameters that one token is multiplied with (of experts, those chosen).
        kv_numbers: numbers per token in the keys and values of one layer of each shape.
        tied: whether the embeddings are the output head too.
        extendable: whether longrope can extend the model; otherwise ``reason`` says why not.
        base_factors: factors that an extension starts from: ones, or those of scaling that is kept.
        base_attention_factor: attention factor that an extension starts from.
        boundary: length at which a checkpoint's long factors must begin, if the model's own
            scores count positions in units of it.
        explicit_scores: transformers has no fused attention for the model, so training uses
            longrope's attention.
        sliding_layers: attention layers that see only the last ``sliding_window`` tokens.
        rotary_layer_type: the layer type that is rescaled, where each has RoPE parameters.
        replaces_scaling: whether the model is to be loaded without its existing scaling.
        scales_scores: whether its scaling multiplies all scores, also of dimensions without RoPE.
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
    rope_scaling: dict[str, Any] | None
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
    rotary_layer_type: str | None = None
    replaces_scaling: bool = False
    scales_scores: bool = False

    @property
    def name(self) -> str:
        """The inspected model's name for publication: a hub id, or the end of a local path."""
        return display_name(self.source)

    def require_extendable(self) -> None:
        """Refuse an inspected model that cannot be extended.

        Raises:
            ValueError: names the model and the reason.
        """
        if self.reason is not None:
            raise ValueError(
                f"{self.source} ({self.architecture}) cannot be extended: {self.reason}"
            )

    def check_representable(self, existing: ScalingChoice | None, boundary: int) -> None:
        """Refuse an extension of the inspected model that no checkpoint's config can express.

        Args:
            existing: whether existing scaling was kept or replaced.
            boundary: tokens up to which the short factors apply.

        Raises:
            ValueError: names the part of the model that would be lost.
        """
        if self.boundary not in (None, boundary):
            raise ValueError(
                f"{self.source}: its scores grow with the position in units of "
                f"original_max_position_embeddings ({self.boundary:,}), which in a checkpoint is "
                f"also the length that short factors apply up to ({boundary:,}): these must be "
                "equal, as with rope_scaling='replace' and no `original_length`"
            )
        if existing != "replace" and self.scales_scores:
            raise ValueError(
                f"{self.source}: its scaling multiplies all scores (mscale_all_dim), which no "
                "checkpoint with longrope factors can express; search again with "
                "rope_scaling='replace', which drops it"
            )

    def rescale(self, method: str, target: int, length: int | None = None) -> Rescale:
        """Return a known method's factors for the inspected model, on top of kept scaling.

        Args:
            method: such as ``"yarn"``; ``"none"`` is no extension.
            target: tokens that the factors are made for.
            length: tokens of the sequence; dynamic NTK depends on it.

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
            base_factors=self.base_factors if any(f != 1 for f in self.base_factors) else (),
        )

    def forward_flops(self, length: int) -> tuple[float, float]:
        """Return the inspected model's FLOPs per forward pass: products with weights, attention.

        Each token costs two per weight (the embedding table only if it is the head too).
        Attention costs 4 · heads · head_dim per layer and visible pair of tokens. Recurrent
        states are not counted, and sliding layers are taken to be as large as the others.
        """
        multiplied = self.active_parameters
        multiplied -= 0 if self.tied else self.vocabulary * self.hidden_size
        hidden = self.sliding_layers * max(0, length - (self.sliding_window or length)) ** 2
        pairs = (self.attention_layers * length * length - hidden) / 2
        return 2.0 * multiplied * length, 4.0 * self.heads * self.head_dim * pairs


def inspect_model(
    source: Any,
    *,
    rope_scaling: ScalingChoice | None = None,
    original_length: int | None = None,
    trust_remote_code: bool = False,
) -> ModelInfo:
    """Inspect a model from its config alone, without reading weights.

    Args:
        source: a local directory, a hub id, a GGUF file, ``"bundled"``, or a transformers model in
            memory, PEFT's wrapper included.
        rope_scaling: ``"keep"`` extends a scaled model on top of its scaling, ``"replace"``
            starts over without it. A scaled model needs one of the two to be extendable.
        original_length: tokens that the model handles, where its config is wrong.
        trust_remote_code: run code that comes with the model.

    Raises:
        ValueError: there is no such model, or transformers does not know its config.

    Example:
        >>> import longrope
        >>> info = longrope.inspect_model("bundled")
        >>> info.original_max_position_embeddings, info.extendable
        (256, True)
    """
    if original_length is not None and not 1 <= original_length <= LONGEST:
        raise ValueError(f"original_length is {original_length}; it must be at least 1")
    if rope_scaling not in (None, "keep", "replace"):
        raise ValueError(f"rope_scaling is {rope_scaling!r}; choose keep or replace")
    loaded = None if isinstance(source, str | Path) else without_adapters(source)
    source = str(source) if loaded is None else loaded.name_or_path or type(loaded).__name__
    if loaded is None and (rope_scaling != "replace" or original_length is None):
        refuse_scaled_gguf(source)
    with quiet():
        if loaded is None:
            config = read_pretrained(AutoConfig, source, trust_remote_code)
        else:
            config = copy.deepcopy(loaded.config)
        model, site, reason = build_meta_model(
            source, config, trust_remote_code, None if loaded is None else type(loaded)
        )
        scaled = site is not None and site.rope_type not in UNSCALED
        scaling = site.parameters if site and scaled else None
        scales_scores = False
        if site and scaling and scaling.get("mscale_all_dim"):  # which some architectures ignore
            kind = type(model)
            plain = unscaled(config, site.layer_type)
            plain = build_meta_model(source, plain, trust_remote_code, kind)[0]
            scales_scores = _score_scales(model) != _score_scales(plain)
        replaces = rope_scaling == "replace" and scaling is not None
        if replaces and site and site.rope_type in RESCALABLE:
            site, reason = find_rescalable(model, replace_scaling=True)
    try:
        info = _from_config(source, model, config, site, scaling, reason)
    except Exception as error:  # layers of different shapes, for example
        raise ValueError(
            f"{source}: its config is of a kind that cannot be read ({error})"
        ) from error
    if site is None:
        return info
    info = dataclasses.replace(info, replaces_scaling=replaces, scales_scores=scales_scores)
    if replaces and loaded is None and is_folded(Path(source)) and reason is None:
        info = dataclasses.replace(info, reason=FOLDED)
    if loaded is not None:
        info = dataclasses.replace(info, dtype=str(loaded.dtype).removeprefix("torch."))
    in_file = loaded is not None or is_in_config_file(source, config.get_text_config(), _LENGTH)
    return _with_original_length(info, site, config, in_file, rope_scaling, original_length)


def _score_scales(model: nn.Module) -> list[float]:
    """Return what each attention layer multiplies its scores with."""
    scales = (getattr(module, "scaling", None) for module in model.modules())
    return [scale for scale in scales if isinstance(scale, float)]


def is_folded(checkpoint: Path) -> bool:
    """Return whether ``longrope export`` folded an attention factor into a checkpoint's weights."""
    manifest = checkpoint / "longrope.json"
    content = read_json(manifest) if manifest.is_file() else None
    return isinstance(content, dict) and content.get("folded") is not None


def without_adapters(model: Any) -> Any:
    """Return the transformers model inside a wrapper of PEFT, adapters included.

    Raises:
        ValueError: not a transformers model, or PEFT's prompts, which are no part of it.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        kind = getattr(model.active_peft_config.peft_type, "value", "prompts")
        raise ValueError(
            f"model has learned prompts of PEFT ({kind}), which stand before every text and are no "
            "part of its weights; give model.get_base_model() to leave them out"
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"model is a {type(model).__name__}; give a transformers model, or the path or hub id "
            "of one"
        )
    return base


def _from_config(
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
    if isinstance(dtype, str):  # save_pretrained leaves its name in the config
        dtype = getattr(torch, dtype)
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
        rope_scaling=scaling,
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
        rotary_layer_type=site.layer_type if site else None,
    )


def _with_original_length(
    info: ModelInfo,
    site: RotarySite,
    config: Any,
    in_file: bool,
    existing: ScalingChoice | None,
    original_length: int | None,
) -> ModelInfo:
    """Add the original length, and the scaling an extension starts from, to a model's info."""
    text, read_from = config.get_text_config(), _LENGTH
    original = getattr(text, read_from, None)
    if not in_file:
        read_from = f"the default of {type(text).__name__} (not in its config.json)"
    factors, attention_factor, reason = unscaled_factors(site), 1.0, info.reason
    scaling = info.rope_scaling
    kind = scaling and scaling["rope_type"]
    longest = scaled_length(scaling, original) if scaling and original else original
    if scaling and existing == "keep":
        factors, attention_factor = existing_factors(site), site.attention_factor
        if longest != original:
            original, read_from = longest, f"its {kind} scaling"
        if kind == "dynamic":
            reason = reason or (
                "its dynamic scaling changes with the length and cannot be kept; use "
                "rope_scaling='replace'; to measure dynamic scaling, add rescale='dynamic-ntk' "
                f"target={longest}"
            )
    elif scaling and "original_max_position_embeddings" in scaling:
        original = scaling["original_max_position_embeddings"]
        read_from = "rope_parameters.original_max_position_embeddings"
    if original_length is not None:
        original, read_from = original_length, "original_length"
    elif kind == "linear" and existing == "replace":
        reason = reason or (
            "its config does not hold the length before its linear scaling by "
            f"{scaling['factor']:g}; give `original_length`"  # type: ignore[index]
        )
    if original is None:
        reason = (
            reason or "its config does not hold the length that it handles; give `original_length`"
        )
    if existing != "replace" and (field := ignored_scaling(site.parameters)):
        reason = reason or (
            f"its rope_parameters have {field} without a rope_type, which transformers ignores and "
            "other engines may apply; give the type in its config (such as linear), or use "
            "rope_scaling='replace' to drop it"
        )
    if scaling and existing is None and reason is None:
        reason = _needs_choice(str(kind), longest)
    return dataclasses.replace(
        info,
        original_max_position_embeddings=original,
        original_read_from=read_from,
        base_factors=tuple(factors.tolist()),
        base_attention_factor=attention_factor,
        extendable=reason is None,
        reason=reason,
    )


def _needs_choice(kind: str, longest: int | None) -> str:
    keep = (
        f"rope_scaling='keep' (extend from its scaled length, {longest:,}, on top of its "
        "factors) or "
    )
    return (
        f"it already has {kind!r} scaling: choose {'' if kind == 'dynamic' else keep}"
        "rope_scaling='replace' (start over, unscaled)"
    )
