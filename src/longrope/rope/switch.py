"""Switch between short and long factors per row, also while generating.

transformers' own ``longrope`` picks one set of factors for a whole batch at each call and keeps
cached keys, so a generation that crosses the boundary is wrong. Here each row is judged by its
own length. When a row crosses the boundary, the cache is refilled from its token ids: exact, at
the cost of one more prefill per row.
"""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from longrope.compat import cache_name
from longrope.rope.apply import (
    RescaledRotary,
    apply_rescale,
    one_axis,
    positions_of,
    remove_rescale,
    rotary_to_rescale,
)
from longrope.rope.own_scaling import own_rescale
from longrope.rope.pair import RescalePair
from longrope.rope.rescale import Rescale
from longrope.rope.rotary import RotarySite, find_rotary, inside_wrappers
from longrope.stand_in import StandIn

_F = TypeVar("_F", bound=Callable)
# Prefixes of multimodal inputs.
_NO_TEXT = ("pixel_", "image_", "video_", "audio_", "input_features", "mm_")


@contextlib.contextmanager
def switched(model: nn.Module, pair: RescalePair) -> Iterator[None]:
    """Switch between both rescales of a pair per row, by its length, within a ``with`` block.

    Raises:
        ValueError: the model has no rotary embedding that can be rescaled, or a rescale does not
            fit. Later, ``generate`` raises for generation modes that cannot be exact.
    """
    apply_pair(model, pair)
    try:
        yield
    finally:
        remove_pair(model)


def apply_pair(model: nn.Module, pair: RescalePair) -> None:
    """Switch a model between both rescales of a pair, by each row's length, until further notice.

    A copy of the model (``copy.deepcopy``, pickle) switches by itself.

    Raises:
        ValueError: as :func:`switched`.
    """
    model = inside_wrappers(model)
    site = rotary_to_rescale(model, pair.short, pair.long)
    switch = _Switch(pair, site)
    rotary = switch.rotary
    around = model if model is not site.owner else None
    rotary.hooks = (
        *([around.register_forward_pre_hook(switch.note, with_kwargs=True)] if around else []),
        site.owner.register_forward_pre_hook(switch.before, with_kwargs=True),
        site.owner.register_forward_hook(switch.after, with_kwargs=True),
    )
    rotary.before = (getattr(site.owner, site.name), model.__dict__.get("generate"))
    setattr(site.owner, site.name, rotary)
    if hasattr(model, "generate"):
        model.generate = functools.partial(switch.generate, model.generate)  # type: ignore[assignment]


def remove_pair(model: nn.Module) -> None:
    """Remove what :func:`apply_pair` put into a model."""
    model = inside_wrappers(model)
    site = find_rotary(model)
    assert site is not None
    rotary = getattr(site.owner, site.name)
    assert isinstance(rotary, _SwitchedRotary)
    for hook in rotary.hooks:
        hook.remove()
    module, generate = rotary.before
    setattr(site.owner, site.name, module)
    model.__dict__.pop("generate", None)
    if generate is not None:
        model.generate = generate


@dataclass(frozen=True)
class Applied:
    """What was applied to a model: a pair that it switches between, and a rescale over that.

    Args:
        model: the model itself, if its own scaling may depend on the length.
    """

    pair: RescalePair | None = None
    rescale: Rescale | None = None
    model: nn.Module | None = None

    def at(self, length: int) -> Rescale | None:
        """Return the rescale for a sequence of a length; None if the model needs none of ours."""
        if self.rescale or self.pair:
            return self.rescale or (self.pair and self.pair.choose(length))
        return None if self.model is None else own_rescale(self.model, length)


@contextlib.contextmanager
def without_rescales(model: nn.Module) -> Iterator[Applied]:
    """Take the applied factors out of a model for a ``with`` block, and return them.

    These are what :func:`apply_pair` and :func:`longrope.rope.apply.apply_rescale` put in.
    """
    site = find_rotary(model)
    if site is None:
        yield Applied()
        return
    over = getattr(site.owner, site.name)
    remove_rescale(model)
    switch = getattr(site.owner, site.name)
    applied = Applied(
        switch.pair if isinstance(switch, _SwitchedRotary) else None,
        over.rescale if isinstance(over, RescaledRotary) else None,
        model,
    )
    if applied.pair:
        remove_pair(model)
    try:
        yield applied
    finally:
        if applied.pair:
            apply_pair(model, applied.pair)
        if applied.rescale:
            apply_rescale(model, applied.rescale)


def _not_compiled(function: _F) -> _F:
    """Leave a function out of torch.compile, which would take a :class:`_Call` for constant."""
    return torch.compiler.disable(function)  # type: ignore[return-value]


def _require_own_positions(
    position_ids: Tensor, tokens: Tensor, mask: Tensor | None, cached: int
) -> None:
    """Refuse position ids for the short/long switch that do not count the tokens of a row.

    Raises:
        ValueError: several documents are packed in a row, or a row does not begin at position 0.
    """
    expected = positions_of(tokens, mask, cached)
    given = one_axis(position_ids).to(expected.device).expand_as(expected)
    counted = True if mask is None else mask[:, -tokens.shape[1] :].bool()
    if (counted & (given != expected)).any():
        raise ValueError(
            "position_ids do not count the tokens of each row: the short/long switch chooses "
            "factors by a row's length; give each document a row of its own, without position_ids"
        )


class _Call(threading.local):
    """What the hooks of a call tell each other; each thread has its own."""

    def __init__(self) -> None:
        self.prompts: Tensor | None = None  # lengths of the prompts passed to generate()
        self.model_inputs: dict[str, Any] = {}  # inputs of the model around the decoder
        self.ids = torch.zeros(1, 0)  # all token ids, cached ones too
        self.new = 0  # how many of them are new
        self.long_rows = torch.zeros(1, dtype=torch.bool)  # rows with long factors

    def __reduce__(self) -> Any:  # a copy of the model starts afresh
        return _Call, ()


class _SwitchedRotary(StandIn):
    """Stand-in for a model's rotary module: both rescales, chosen by the call's ``long_rows``."""

    def __init__(self, pair: RescalePair, site: RotarySite):
        super().__init__(site.module)
        self.config, self.rope_type = site.module.config, "longrope"
        self.pair = pair
        self.hooks: tuple[Any, ...] = ()
        self.before: tuple[Any, ...] = ()  # the rotary module and `generate` before the pair
        self.short, self.long = (RescaledRotary(site, r) for r in (pair.short, pair.long))
        self.call = _Call()

    @_not_compiled
    def forward(self, x: Tensor, position_ids: Tensor, *kind: Any, **named: Any) -> Any:
        rows = self.call.long_rows
        if rows.all() or not rows.any():
            return (self.long if rows.all() else self.short)(x, position_ids, *kind, **named)
        positions = one_axis(position_ids).expand(len(rows), -1)
        chosen = rows.to(x.device)[:, None, None]
        short, long = (rope(x, positions, *kind, **named) for rope in (self.short, self.long))
        if isinstance(short, Tensor):
            return torch.where(chosen, long, short)
        return tuple(torch.where(chosen, b, a) for a, b in zip(short, long, strict=True))


@dataclass
class _Filled:
    """Contents of a cache: token ids (batch, tokens), and which rows used a pair's long factors."""

    ids: Tensor
    long_rows: Tensor
    pair: RescalePair


_FILLED = "longrope_filled"  # attribute of a cache, so that a copy of the cache has it too


class _Switch:
    """Hooks of the short/long switch: choose factors per row, refill the cache at a crossing."""

    def __init__(self, pair: RescalePair, site: RotarySite):
        self.recovery_length, self.site = pair.recovery_length, site
        self.rotary = _SwitchedRotary(pair, site)
        self.call = self.rotary.call

    @property
    def covered(self) -> bool:
        """Whether another rescale was applied over the pair."""
        return getattr(self.site.owner, self.site.name) is not self.rotary

    @_not_compiled
    def note(self, model: Any, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the switch: note a multimodal model's token ids and mask.

        Its decoder gets embeddings instead of token ids.

        Raises:
            ValueError: the input contains an image, a video or audio.
        """
        if self.covered:
            return
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        given = given | given.pop("kwargs", {})
        for name, value in given.items():
            empty = value is None or (isinstance(value, dict) and not value)
            if name.startswith(_NO_TEXT) and not empty:
                raise ValueError(f"{name}: the short/long switch supports text only")
        self.call.model_inputs = {name: given.get(name) for name in ("input_ids", "attention_mask")}

    @_not_compiled
    def before(self, decoder: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook of the switch: choose factors per row, refill the cache at a crossing.

        Raises:
            ValueError: no token ids or row lengths, position ids of packed documents, or a cache
                that was filled elsewhere.
        """
        if self.covered:
            return args, kwargs
        given = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
        given = given | given.pop("kwargs", {})
        inputs_of_model, self.call.model_inputs = self.call.model_inputs, {}  # for this call only
        if given.get("input_ids") is None and inputs_of_model.get("input_ids") is not None:
            given |= inputs_of_model
            for made in ("inputs_embeds", "per_layer_inputs"):
                given.pop(made, None)
        ids, name = given.get("input_ids"), cache_name(decoder)
        cache = given.get(name, given.get("past_key_values"))  # the old name is still accepted
        if ids is None:
            raise ValueError(
                "inputs_embeds: the short/long switch requires token ids to refill the cache when "
                "a sequence crosses the boundary: pass input_ids"
            )
        mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise ValueError(
                "attention_mask: the short/long switch reads each row's length from a mask of "
                "shape (batch, tokens): pass such a mask, and no static cache"
            )
        cached = cache.get_seq_length() if cache is not None else 0
        new = ids.shape[1]
        long_rows = self._judge(ids, mask, cached)
        if cached:
            filled: _Filled | None = getattr(cache, _FILLED, None)
            if filled is None or filled.pair != self.rotary.pair or filled.ids.shape[1] != cached:
                raise ValueError(
                    f"{name}: its {cached} tokens were not all cached under this switch: "
                    "start from an empty cache"
                )
            ids = torch.cat([filled.ids, ids], dim=1)
            if not torch.equal(filled.long_rows, long_rows):
                cache.reset()  # type: ignore[union-attr]
                given = given | {"position_ids": None, "input_ids": ids}
                given.pop("cache_position", None)
        if given.get("position_ids") is not None:
            _require_own_positions(given["position_ids"], given["input_ids"], mask, cached)
        else:
            start = cached if given["input_ids"].shape[1] == new else 0
            given["position_ids"] = positions_of(given["input_ids"], mask, start)
        self.call.long_rows, self.call.ids, self.call.new = long_rows, ids, new
        return (), given

    @_not_compiled
    def after(self, decoder: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        """Forward hook of the switch: note the cache's contents, keep only new hidden states."""
        if self.covered:
            return output
        new = self.call.new
        cache = getattr(output, cache_name(decoder), None)
        if cache is not None:
            filled = _Filled(self.call.ids, self.call.long_rows, self.rotary.pair)
            setattr(cache, _FILLED, filled)
        output.last_hidden_state = output.last_hidden_state[:, -new:]
        if getattr(output, "hidden_states", None):
            output.hidden_states = tuple(hidden[:, -new:] for hidden in output.hidden_states)
        if getattr(output, "attentions", None):
            output.attentions = tuple(weights[:, :, -new:] for weights in output.attentions)
        return output

    def _judge(self, ids: Tensor, mask: Tensor | None, cached: int) -> Tensor:
        """Return which rows switch to long factors, (batch,): those longer than the boundary.

        Padding does not count.
        """
        if mask is None:
            lengths = torch.full((ids.shape[0],), cached + ids.shape[1])
        else:
            lengths = mask.long().sum(dim=1).cpu()
        prompts = self.call.prompts
        if prompts is not None and len(lengths) % len(prompts) == 0:
            prompts = prompts.repeat_interleave(len(lengths) // len(prompts))
            lengths = torch.maximum(lengths, prompts)  # a prompt that is prefilled in chunks
        return lengths > self.recovery_length

    def generate(self, original: Any, inputs: Any = None, *args: Any, **options: Any) -> Any:
        """Call ``generate`` under the short/long switch; refuse modes in which it is not exact.

        Raises:
            ValueError: assisted generation, beam search or a static cache.
        """
        if self.covered:
            return original(inputs, *args, **options)
        given = options.get("generation_config", args[0] if args else None)
        configs = (given, getattr(original.__self__, "generation_config", None))

        def option(name: str) -> Any:
            """Resolve a generation option: the argument, the given config, the model's own."""
            found = (getattr(config, name, None) for config in configs)
            return options.get(name, next((value for value in found if value is not None), None))

        refused = {
            "assistant_model": "assisted generation crops the cache",
            "prompt_lookup_num_tokens": "assisted generation crops the cache",
            "assistant_early_exit": "assisted generation crops the cache",
        }
        for name, why in refused.items():
            if option(name):
                raise ValueError(f"{name}: {why}, which the short/long switch does not support")
        if (option("num_beams") or 1) > 1:
            raise ValueError(
                f"num_beams is {option('num_beams')}: beam search reorders the cache, which the "
                "short/long switch does not support: use num_beams=1"
            )
        kind = option("cache_implementation")
        cache = options.get("cache", options.get("past_key_values"))
        # Gemma's configs still say hybrid, which transformers 5 treats as dynamic.
        static = kind not in (None, "dynamic", "dynamic_full", "hybrid")
        if static or getattr(cache, "is_compileable", False):
            raise ValueError(
                f"cache_implementation is {kind or type(cache).__name__!r}: only dynamic caches "
                "can be refilled at the boundary: use cache_implementation='dynamic'"
            )
        ids = inputs if inputs is not None else options.get("input_ids")
        mask = options.get("attention_mask")
        if mask is None and ids is not None:
            mask = _inferred_mask(ids, option("pad_token_id"), option("eos_token_id"))
        if mask is not None:
            self.call.prompts = mask.long().sum(dim=1).cpu()
        try:
            return original(inputs, *args, **options)
        finally:
            self.call.prompts = None


def _inferred_mask(ids: Tensor, pad: Any, eos: Any) -> Tensor:
    """Infer the attention mask of a prompt as ``generate`` does: pad tokens that are no EOS."""
    ends = torch.as_tensor([] if eos is None else eos).flatten().tolist()
    if pad is None or int(pad) in ends:
        return torch.ones_like(ids)
    return ids.ne(int(pad))
