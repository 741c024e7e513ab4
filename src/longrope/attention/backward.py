"""Backward pass of causal attention over a whole sequence.

The weights are recomputed from the log-sum-exp over all keys, so the forward pass stores no
scores. Uses the device's fused kernel where one exists, else plain matrix products over blocks
of queries and keys.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from longrope.attention import chunked as attention
from longrope.attention.chunked import Options, causal_attention_with_lse, repeat_kv, slices

log = logging.getLogger(__name__)

# Block size in keys where no kernel fits.
KEYS = 1024
# Returns the gradients of query, key and value. Called with: whether attention is causal, the
# scaling, and output gradient, query, key, value, output, log-sum-exp with equal numbers of heads.
Kernel = Callable[..., tuple[Tensor, Tensor, Tensor]]


def attention_backward(
    output_grad: Tensor, saved: tuple[Tensor, ...], options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key and value in causal attention.

    Differentiates :func:`longrope.attention.chunked.attention_with_lse` with as many queries as
    keys. Sinks need no term here: they are part of the log-sum-exp and have no value.

    Args:
        output_grad: gradient of the output, shape (B, H, T, D).
        saved: query (B, H, T, D), key and value (B, K, T, D) with K dividing H, output
            (B, H, T, D) and log-sum-exp (B, H, T).
        options: scaling, soft-cap and window of the forward pass.

    Returns:
        The gradients of query, key and value, in their shapes.
    """
    (query, key, value, output, lse), output_grad = saved, output_grad.contiguous()
    scaling, softcap, window, _ = options
    tokens = query.shape[2]
    assert key.shape[2] == tokens, "as many queries as keys are required"
    if window is not None and window >= tokens:
        window = None
    kernel = None if softcap or window else _kernel(query, value)
    if kernel is not None and not _accumulates_in_half(query):
        return _kernel_backward(output_grad, saved, scaling, kernel)
    query_grad, some = torch.empty_like(query), attention.query_block_size(window)
    if kernel is not None:  # it folds the query heads that share a key head into rows
        some = max(1, attention.QUERIES * key.shape[1] // query.shape[1])
    exact = torch.promote_types(query.dtype, torch.float32)
    key_grad, value_grad = (torch.zeros_like(tensor, dtype=exact) for tensor in (key, value))
    for rows in slices(0, tokens, some):
        seen = slice(0 if window is None else max(0, rows.start - window + 1), rows.stop)
        part = query[:, :, rows], key[:, :, seen], value[:, :, seen], output[:, :, rows]
        part = *part, lse[:, :, rows]
        if kernel is not None:
            found = _kernel_backward(output_grad[:, :, rows], part, scaling, kernel)
        else:
            found = _block_backward(output_grad[:, :, rows], part, scaling, softcap, window)
        query_grad[:, :, rows] = found[0]
        key_grad[:, :, seen] += found[1]
        value_grad[:, :, seen] += found[2]
    return query_grad, key_grad.to(key.dtype), value_grad.to(key.dtype)


def sink_gradients(output_grad: Tensor, saved: tuple[Tensor, ...], sinks: Tensor) -> Tensor:
    """Compute the gradient of the attention sinks in the backward pass, shape (H,).

    A sink takes a share P of the weights and has no value, so dS = −P · rowsum(dO ∘ O).

    Args:
        output_grad: gradient of the output, shape (B, H, T, D).
        saved: as in :func:`attention_backward`.
        sinks: one score per head, shape (H,).
    """
    *_, output, lse = saved
    exact = torch.promote_types(output.dtype, torch.float32)
    shares = torch.exp(sinks.to(exact)[:, None] - lse.to(exact))
    delta = (output_grad.to(exact) * output.to(exact)).sum(dim=-1)
    return -(shares * delta).sum(dim=(0, 2)).to(sinks.dtype)


def _accumulates_in_half(query: Tensor) -> bool:
    """Whether the backward kernel sums key gradients in half precision, as torch's on the CPU."""
    return query.device.type == "cpu" and query.dtype.itemsize < 4


def _block_backward(
    output_grad: Tensor,
    saved: tuple[Tensor, ...],
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute attention gradients with matrix products, one block of keys at a time.

    With weights P and output O: dV = Pᵀ dO, dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O)).
    """
    query, key, value, output, lse = saved
    groups, dtype = query.shape[1] // key.shape[1], query.dtype
    exact = torch.promote_types(dtype, torch.float32)
    delta = (output_grad.to(exact) * output.to(exact)).sum(dim=-1, keepdim=True)
    query_grad = torch.zeros_like(query, dtype=exact)
    key_grad, value_grad = torch.zeros_like(key), torch.zeros_like(value)
    first, chunk = key.shape[2] - query.shape[2], query.shape[2]
    for start in range(0, key.shape[2], KEYS):
        block = slice(start, min(start + KEYS, key.shape[2]))
        # The queries that see any key of the block.
        low = max(0, block.start - first)
        high = chunk if window is None else min(chunk, block.stop - 1 + window - first)
        if low >= high:
            continue
        q, dy, rows = query[:, :, low:high], output_grad[:, :, low:high], slice(low, high)
        k, v = repeat_kv(key[:, :, block], groups), repeat_kv(value[:, :, block], groups)
        # At the precision of the forward kernel, else the weights do not add up to 1.
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
        score_grad = (dy @ v.transpose(2, 3)).to(exact) - delta[:, :, rows]
        score_grad = score_grad * weights * scaling
        if capped is not None:
            score_grad = score_grad * (1 - capped * capped)
        score_grad = score_grad.to(dtype)
        query_grad[:, :, rows] += (score_grad @ k).to(exact)
        key_grad[:, :, block] = _summed(score_grad.transpose(2, 3) @ q, groups)
        value_grad[:, :, block] = _summed(weights.to(dtype).transpose(2, 3) @ dy, groups)
    return query_grad.to(dtype), key_grad, value_grad


def _kernel_backward(
    output_grad: Tensor, saved: tuple[Tensor, ...], scaling: float, kernel: Kernel
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute attention gradients with a fused backward kernel.

    The kernel runs twice: on the keys before the queries without a mask, and on the queries' own
    keys with a causal mask. The query gradients of both runs are added.
    """
    query, key, value, output, lse = saved
    groups, past = query.shape[1] // key.shape[1], key.shape[2] - query.shape[2]
    own = (repeat_kv(t[:, :, past:], groups) for t in (key, value))
    query_grad, key_grad, value_grad = kernel(True, scaling, output_grad, query, *own, output, lse)
    own_grads = (_summed(key_grad, groups), _summed(value_grad, groups))
    if past == 0:
        return query_grad, *own_grads

    def folded(heads: Tensor) -> Tensor:
        return heads.unflatten(1, (-1, groups)).flatten(2, 3)

    folded_grad, *past_grads = kernel(
        False,
        scaling,
        *(folded(t) for t in (output_grad, query)),
        *(t[:, :, :past] for t in (key, value)),
        *(folded(t) for t in (output, lse)),
    )
    key_grad, value_grad = (
        torch.cat(both, dim=2) for both in zip(past_grads, own_grads, strict=True)
    )
    return query_grad + folded_grad.reshape(query_grad.shape), key_grad, value_grad


def _kernel(query: Tensor, value: Tensor) -> Kernel | None:
    """Return the device's fused backward kernel for these head dimensions, or None."""
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
    """Call torch's CPU flash attention backward kernel."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *parts, 0.0, causal, scale=scaling
    )


def _cuda_kernel(causal: bool, scaling: float, *parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Call torch's CUDA flash attention backward kernel."""
    _, query, key, *_, lse = parts
    ops, one = torch.ops.aten, query[:, :, :1]
    # The forward kernel's extra outputs, which its backward requires; they differ by version.
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
    """Whether the CUDA backward kernel agrees with plain matrix products; warns once if not."""
    # Without a past, as this kernel only sees whole sequences.
    found = matches_products(_cuda_kernel, device, dtype, dim, past=0)
    if not found:
        log.warning(
            "no fused attention backward kernel for %s, head dimension %d: using slower products",
            dtype,
            dim,
        )
    return found


def matches_products(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, dim: int, past: int = 200
) -> bool:
    """Whether a backward kernel agrees with plain matrix products on a small case.

    Not every GPU supports every head dimension, and the kernels are undocumented, so each is
    checked once before use.

    Args:
        kernel: the kernel to check.
        device: where to run it.
        dtype: of the inputs.
        dim: head dimension.
        past: number of keys before the queries.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, tokens: int) -> Tensor:
        shape = (1, heads, tokens, dim)
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    query, output_grad = draw(4, 100), draw(4, 100)
    key, value = draw(2, past + 100), draw(2, past + 100)
    scaling = dim**-0.5
    try:
        saved = (query, key, value, *causal_attention_with_lse(query, key, value, scaling))
        found = _kernel_backward(output_grad, saved, scaling, kernel)
    except torch.OutOfMemoryError:  # says nothing about the kernel; the caller retries smaller
        raise
    except RuntimeError:
        return False
    exact = _block_backward(
        output_grad.double(), tuple(tensor.double() for tensor in saved), scaling, None, None
    )
    plain = _block_backward(output_grad, saved, scaling, None, None)
    return all(
        (ours - true).norm() <= 2 * (theirs - true).norm() + 1e-6 * true.norm()
        for ours, theirs, true in zip(found, plain, exact, strict=True)
    )


def _summed(heads: Tensor, groups: int) -> Tensor:
    """Sum gradients over the query heads that share a key head, giving shape (B, K, T, D)."""
    return heads.unflatten(1, (-1, groups)).sum(dim=2) if groups > 1 else heads
