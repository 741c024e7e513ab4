"""Attention with a memory-efficient backward pass, registered with transformers.

The backward pass recomputes the scores from the saved log-sum-exp, so it stores no attention
matrix. While a layer runs split from its attention
(:class:`longrope.layerwise.split_attention.SplitAttention`), a replacement set by
:func:`replaced_attention` is called in its place.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from longrope.attention.backward import attention_backward, sink_gradients
from longrope.attention.chunked import Options, attention_with_lse, check_arguments, chunk_attention

# Names under which the functions below are registered with transformers.
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
    """Compute causal attention over a whole sequence, differentiable by autograd.

    Arguments and shapes as in :func:`longrope.attention.chunked.chunk_attention`. Inside
    :func:`replaced_attention` the replacement is called instead.

    Raises:
        ValueError: the model passes an attention mask or an unsupported argument.
    """
    check_arguments(attention_mask, others)
    options = Options(scaling, softcap or None, sliding_window, s_aux)
    replacement = _REPLACEMENT.get()
    if replacement is not None:
        return replacement(query, key, value, options).transpose(1, 2).contiguous(), None
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # the dtype that torch's own kernels would get
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        output, lse = attention_with_lse(query, key, value, options)
    output = _Attention.apply(query, key, value, s_aux, output, lse, options)
    return output.transpose(1, 2).contiguous(), None  # type: ignore[union-attr]


def trained_attention(
    module: Any, query: Tensor, key: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, None]:
    """Compute differentiable attention for training: torch's SDPA where it suffices, else our own.

    Our own is used for a sliding window shorter than the sequence, soft-caps and sinks, where
    SDPA would need a dense mask or materialise all scores.
    """
    near = (options.get("sliding_window") or math.inf) < key.shape[2]
    ours = near or options.get("softcap") or options.get("s_aux") is not None
    attention = differentiable_attention if ours else chunk_attention
    return attention(module, query, key, *rest, **options)


AttentionInterface.register(NAME, differentiable_attention)
AttentionInterface.register(TRAINED, trained_attention)
# The replacement that replaced_attention sets. transformers finds attention by name and passes
# it nothing but the layer's own arguments, so a replacement cannot be passed as an argument; a
# ContextVar keeps it local to the thread and to the `with` block.
_REPLACEMENT: ContextVar[Callable[..., Tensor] | None] = ContextVar("attention", default=None)


@contextlib.contextmanager
def replaced_attention(attention: Callable[..., Tensor]) -> Iterator[None]:
    """Call ``attention`` in place of :func:`differentiable_attention` within a ``with`` block.

    It is called as ``attention(query, key, value, options)`` and returns shape (B, H, T, D).
    """
    token = _REPLACEMENT.set(attention)
    try:
        yield
    finally:
        _REPLACEMENT.reset(token)


class _Attention(torch.autograd.Function):
    """Autograd function for attention whose output is already computed.

    Its backward pass recomputes the scores from the log-sum-exp.
    """

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
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        # Read once: under checkpointing saved tensors can be unpacked only once.
        saved, sink_grad = ctx.saved_tensors, None
        if ctx.needs_input_grad[3]:
            sink_grad = sink_gradients(output_grads[0], saved, ctx.options.sinks)
        return (
            *attention_backward(output_grads[0], saved, ctx.options),
            sink_grad,
            None,
            None,
            None,
        )
