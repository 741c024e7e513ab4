"""Attention that gradients go through, for the long gradient.

Where a layer runs chunk by chunk, its attention is taken out of it (:class:`Apart`): forward a
chunk at a time as in ``attention.py``, backward over the whole sequence, some heads at a time.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from longrope.attention.backward import sink_gradients, slopes
from longrope.attention.chunked import Options, attend, chunk_attention, refuse_others

NAME, TRAINED = "longrope_differentiable", "longrope_trained"


def differentiable_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """:func:`longrope.attention.chunked.chunk_attention` with a backward pass, of a whole sequence.

    Where the attention is :class:`Apart`, as that has it.
    """
    refuse_others(attention_mask, others)
    options = Options(scaling, softcap or None, sliding_window, s_aux)
    apart = _REPLACEMENT.get()
    if apart is not None:
        return apart(query, key, value, options).transpose(1, 2).contiguous(), None
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # as torch has its own kernels take them
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        output, lse = attend(query, key, value, options)
    output = _Attention.apply(query, key, value, s_aux, output, lse, options)
    return output.transpose(1, 2).contiguous(), None  # type: ignore[union-attr]


def trained_attention(
    module: Any, query: Tensor, key: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, None]:
    """What weights are trained through: torch's own attention where it needs no mask, or ours."""
    near = (options.get("sliding_window") or math.inf) < key.shape[2]
    by_us = near or options.get("softcap") or options.get("s_aux") is not None
    attention = differentiable_attention if by_us else chunk_attention
    return attention(module, query, key, *rest, **options)


AttentionInterface.register(NAME, differentiable_attention)
AttentionInterface.register(TRAINED, trained_attention)
# What stands in for attention while it is apart.
_REPLACEMENT: ContextVar[Callable[..., Tensor] | None] = ContextVar("attention", default=None)


@contextlib.contextmanager
def replaced_attention(attention: Callable[..., Tensor]) -> Iterator[None]:
    token = _REPLACEMENT.set(attention)
    try:
        yield
    finally:
        _REPLACEMENT.reset(token)


class _Attention(torch.autograd.Function):
    """Attention that is computed already; the scores are made again going back."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        output: Tensor,
        lse: Tensor,
        options: Options,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.options = options
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *by_output: Tensor) -> tuple[Tensor | None, ...]:
        saved, by_sinks = ctx.saved_tensors, None  # asked for once: a checkpoint has no more
        if ctx.needs_input_grad[3]:
            by_sinks = sink_gradients(by_output[0], saved, ctx.options.sinks)
        return (*slopes(by_output[0], saved, ctx.options), by_sinks, None, None, None)
