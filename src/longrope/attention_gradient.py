"""Attention of a chunk that gradients go through, for the long gradient.

Forward as in ``attention.py``; backward from the log-sum-exp over all keys, with which the parts
of a softmax add up: a chunk against the past and against itself, a block of keys at a time.
What a forward without gradients gave can be remembered, so that no score is computed twice
before the backward pass.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from longrope.attention import blockwise, causal, refuse_others, repeated

log = logging.getLogger(__name__)

NAME = "longrope_differentiable"
_KEYS = 1024  # at a time, where no kernel fits
# The slopes of query, key and value: given whether attention was causal, its scaling, and the
# output's slope, query, key, value, output and log-sum-exp.
Kernel = Callable[..., tuple[Tensor, Tensor, Tensor]]


class Memory:
    """Outputs and log-sum-exps of attention, call by call, kept on a device of choice."""

    def __init__(self, device: torch.device):
        self.device = device
        self.calls: list[tuple[Tensor, Tensor]] = []
        self._next = 0

    def remember(self, output: Tensor, lse: Tensor) -> None:
        self.calls.append((output.to(self.device), lse.to(self.device)))

    def recall(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """The next call's, or None where it is to be computed."""
        if self._next >= len(self.calls):
            return None
        output, lse = self.calls[self._next]
        self._next += 1
        return output.to(device), lse.to(device)

    @contextlib.contextmanager
    def at(self, call: int) -> Iterator[None]:
        """Within, calls from this number on are recalled, or remembered if they are new."""
        self._next = call
        token = _MEMORY.set(self)
        try:
            yield
        finally:
            _MEMORY.reset(token)


_MEMORY: ContextVar[Memory | None] = ContextVar("attention", default=None)


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
    **others: Any,
) -> tuple[Tensor, None]:
    """:func:`longrope.attention.chunk_attention` with a backward pass."""
    refuse_others(attention_mask, others)
    if sliding_window is not None and sliding_window >= key.shape[2]:
        sliding_window = None
    options = (scaling, softcap or None, sliding_window)
    memory = _MEMORY.get()
    known = memory.recall(query.device) if memory else None
    if known is None:
        with torch.no_grad():
            known = _attend(query, key, value, *options)
        if memory:
            memory.remember(*known)
    output = _Attention.apply(query, key, value, *known, options)
    return output.transpose(1, 2), None  # type: ignore[union-attr]


AttentionInterface.register(NAME, differentiable_attention)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    if softcap or window:
        return blockwise(query, key, value, scaling, softcap, window)
    return causal(query, key, value, scaling)


class _Attention(torch.autograd.Function):
    """Attention that is computed already; the scores are made again going back."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        options: tuple[float, float | None, int | None],
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.options = options
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        slope = slopes[0].contiguous()
        scaling, softcap, window = ctx.options
        query, _, value, *_ = ctx.saved_tensors
        kernel = None if softcap or window else _kernel(query, value)
        if kernel is None:
            found = _block_backward(slope, ctx.saved_tensors, scaling, softcap, window)
        else:
            found = _flash_backward(slope, ctx.saved_tensors, scaling, kernel)
        return (*found, None, None, None)


def _block_backward(
    slope: Tensor,
    saved: tuple[Tensor, ...],
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """With P the weights and O the output: dV = Pᵀ dO, dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O))."""
    query, key, value, output, lse = saved
    groups, dtype = query.shape[1] // key.shape[1], query.dtype
    exact = torch.promote_types(dtype, torch.float32)
    shared = (slope.to(exact) * output.to(exact)).sum(dim=-1, keepdim=True)
    by_query = torch.zeros_like(query, dtype=exact)
    by_key, by_value = torch.zeros_like(key), torch.zeros_like(value)
    first, chunk = key.shape[2] - query.shape[2], query.shape[2]
    for start in range(0, key.shape[2], _KEYS):
        block = slice(start, min(start + _KEYS, key.shape[2]))
        # Of the queries, those that see any key of the block.
        low = max(0, block.start - first)
        high = chunk if window is None else min(chunk, block.stop - 1 + window - first)
        if low >= high:
            continue
        q, dy, rows = query[:, :, low:high], slope[:, :, low:high], slice(low, high)
        k, v = repeated(key[:, :, block], groups), repeated(value[:, :, block], groups)
        # As exact as the kernel's that gave the log-sum-exp, or the weights do not add up to 1.
        scores, capped = (q.to(exact) @ k.to(exact).transpose(2, 3)) * scaling, None
        if softcap:
            capped = torch.tanh(scores / softcap)
            scores = capped * softcap
        weights = torch.exp(scores - lse[:, :, rows, None].to(exact))
        if block.stop - 1 > first + low or window is not None:
            row = torch.arange(first + low, first + high, device=query.device)[:, None]
            column = torch.arange(block.start, block.stop, device=query.device)[None, :]
            hidden = column > row
            if window is not None:
                hidden |= column <= row - window
            weights = weights.masked_fill(hidden, 0.0)
        by_scores = (dy @ v.transpose(2, 3)).to(exact) - shared[:, :, rows]
        by_scores = by_scores * weights * scaling
        if capped is not None:
            by_scores = by_scores * (1 - capped * capped)
        by_scores = by_scores.to(dtype)
        by_query[:, :, rows] += (by_scores @ k).to(exact)
        by_key[:, :, block] = _summed(by_scores.transpose(2, 3) @ q, groups)
        by_value[:, :, block] = _summed(weights.to(dtype).transpose(2, 3) @ dy, groups)
    return by_query.to(dtype), by_key, by_value


def _kernel(query: Tensor, value: Tensor) -> Kernel | None:
    """The device's own kernel for a backward pass, where it has one for such rows."""
    dim = query.shape[-1]
    if dim != value.shape[-1]:
        return None
    if query.device.type == "cpu":
        return _cpu_kernel
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.device.type == "cuda" and half and dim % 8 == 0 and dim <= 256:
        return _cuda_kernel if _cuda_kernel_agrees(query.device, query.dtype, dim) else None
    return None


def _cpu_kernel(causal: bool, scaling: float, *parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *parts, 0.0, causal, scale=scaling
    )


def _cuda_kernel(causal: bool, scaling: float, *parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _, query, key, *_, lse = parts
    ops, one = torch.ops.aten, query[:, :, :1]
    # What a forward hands to its backward beside results, which differs between versions.
    *_, starts, key_starts, _, _, state, unused, _ = ops._scaled_dot_product_flash_attention(
        one, one, one, 0.0, False, False, scale=scaling
    )
    lengths = query.shape[2], key.shape[2]
    return ops._scaled_dot_product_flash_attention_backward(
        *parts[:-1], lse.contiguous(), starts, key_starts, *lengths,
        0.0, causal, state, unused, scale=scaling,
    )  # fmt: skip


@functools.cache
def _cuda_kernel_agrees(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    found = agrees(_cuda_kernel, device, dtype, dim)
    if not found:
        log.warning("slopes take plain products: no kernel for %s, %d numbers a row", dtype, dim)
    return found


def agrees(kernel: Kernel, device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Whether a kernel gives what plain products give, on a small case with a past.

    Not all GPUs have the kernel for all rows, and it is not documented: so it is proved where it
    is used.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, tokens: int) -> Tensor:
        shape = (1, heads, tokens, dim)
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    query, slope = draw(4, 100), draw(4, 100)
    key, value = draw(2, 300), draw(2, 300)
    scaling = dim**-0.5
    try:
        saved = (query, key, value, *causal(query, key, value, scaling))
        found = _flash_backward(slope, saved, scaling, kernel)
    except torch.OutOfMemoryError:  # a smaller chunk may leave room
        raise
    except RuntimeError:
        return False
    exact = _block_backward(
        slope.double(), tuple(tensor.double() for tensor in saved), scaling, None, None
    )
    plain = _block_backward(slope, saved, scaling, None, None)
    return all(
        (ours - true).norm() <= 2 * (theirs - true).norm() + 1e-6 * true.norm()
        for ours, theirs, true in zip(found, plain, exact, strict=True)
    )


def _flash_backward(
    slope: Tensor,
    saved: tuple[Tensor, ...],
    scaling: float,
    kernel: Kernel,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by a kernel: given the log-sum-exp over all keys, parts just add up."""
    query, key, value, output, lse = saved
    groups, past = query.shape[1] // key.shape[1], key.shape[2] - query.shape[2]
    own_key, own_value = (repeated(t[:, :, past:], groups) for t in (key, value))
    by_query, by_key, by_value = kernel(
        True, scaling, slope, query, own_key, own_value, output, lse
    )
    by_own = (_summed(by_key, groups), _summed(by_value, groups))
    if past == 0:
        return by_query, *by_own

    def folded(heads: Tensor) -> Tensor:
        return heads.unflatten(1, (-1, groups)).flatten(2, 3)

    by_folded, *by_past = kernel(
        False,
        scaling,
        *(folded(t) for t in (slope, query)),
        *(t[:, :, :past] for t in (key, value)),
        *(folded(t) for t in (output, lse)),
    )
    by_key, by_value = (torch.cat(both, dim=2) for both in zip(by_past, by_own, strict=True))
    return by_query + by_folded.reshape(by_query.shape), by_key, by_value


def _summed(heads: Tensor, groups: int) -> Tensor:
    """The sum over the query heads that share a key, shape (B, K, T, D)."""
    return heads.unflatten(1, (-1, groups)).sum(dim=2) if groups > 1 else heads
