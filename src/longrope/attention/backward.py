"""The backward pass of causal attention over a whole sequence.

From the log-sum-exp over all keys, so that it needs no score that the forward pass made; by the
device's own kernel where it has one, else by plain products, a block of queries and keys at a time.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from longrope.attention import chunked as attention
from longrope.attention.chunked import Options, causal, repeat_kv, slices

log = logging.getLogger(__name__)

# Keys at a time, where no kernel fits.
KEYS = 1024
# The slopes of query, key and value: given whether attention was causal, its scaling, and the
# output's slope, query, key, value, output and log-sum-exp, all of as many heads.
Kernel = Callable[..., tuple[Tensor, Tensor, Tensor]]


def slopes(
    slope: Tensor, saved: tuple[Tensor, ...], options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Back through :func:`longrope.attention.chunked.attend`, of as many queries as keys.

    Sinks are in the log-sum-exp already, and have no value: nothing else of them is needed.

    Args:
        slope: of the output, shape (B, H, T, D).
        saved: query (B, H, T, D), key and value (B, K, T, D), K dividing H, output, log-sum-exp.

    Returns:
        The slopes of query, key and value.
    """
    (query, key, value, output, lse), slope = saved, slope.contiguous()
    scaling, softcap, window, _ = options
    tokens = query.shape[2]
    assert key.shape[2] == tokens, "keys that have no queries"
    if window is not None and window >= tokens:
        window = None
    kernel = None if softcap or window else _kernel(query, value)
    if kernel is not None and not _sums_roughly(query):
        return _kernel_backward(slope, saved, scaling, kernel)
    by_query, some = torch.empty_like(query), attention.at_once(window)
    if kernel is not None:  # for which the heads that share keys stand in one row
        some = max(1, attention.QUERIES * key.shape[1] // query.shape[1])
    exact = torch.promote_types(query.dtype, torch.float32)
    by_key, by_value = (torch.zeros_like(tensor, dtype=exact) for tensor in (key, value))
    for rows in slices(0, tokens, some):
        seen = slice(0 if window is None else max(0, rows.start - window + 1), rows.stop)
        part = query[:, :, rows], key[:, :, seen], value[:, :, seen], output[:, :, rows]
        part = *part, lse[:, :, rows]
        if kernel is not None:
            found = _kernel_backward(slope[:, :, rows], part, scaling, kernel)
        else:
            found = _block_backward(slope[:, :, rows], part, scaling, softcap, window)
        by_query[:, :, rows] = found[0]
        by_key[:, :, seen] += found[1]
        by_value[:, :, seen] += found[2]
    return by_query, by_key.to(key.dtype), by_value.to(key.dtype)


def sink_gradients(slope: Tensor, saved: tuple[Tensor, ...], sinks: Tensor) -> Tensor:
    """The slopes of sinks, shape (H,); arguments as above.

    A sink has a share P of the weights and no value, so dS = −P · rowsum(dO ∘ O).
    """
    *_, output, lse = saved
    exact = torch.promote_types(output.dtype, torch.float32)
    shares = torch.exp(sinks.to(exact)[:, None] - lse.to(exact))
    shared = (slope.to(exact) * output.to(exact)).sum(dim=-1)
    return -(shares * shared).sum(dim=(0, 2)).to(sinks.dtype)


def _sums_roughly(query: Tensor) -> bool:
    """A CPU's kernel adds up the slopes of keys in half precision, of whatever queries it gets."""
    return query.device.type == "cpu" and query.dtype.itemsize < 4


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
    for start in range(0, key.shape[2], KEYS):
        block = slice(start, min(start + KEYS, key.shape[2]))
        # Of the queries, those that see any key of the block.
        low = max(0, block.start - first)
        high = chunk if window is None else min(chunk, block.stop - 1 + window - first)
        if low >= high:
            continue
        q, dy, rows = query[:, :, low:high], slope[:, :, low:high], slice(low, high)
        k, v = repeat_kv(key[:, :, block], groups), repeat_kv(value[:, :, block], groups)
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


def _kernel_backward(
    slope: Tensor, saved: tuple[Tensor, ...], scaling: float, kernel: Kernel
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by a kernel: of keys before the queries, and of their own, which add up."""
    query, key, value, output, lse = saved
    groups, past = query.shape[1] // key.shape[1], key.shape[2] - query.shape[2]
    own = (repeat_kv(t[:, :, past:], groups) for t in (key, value))
    by_query, by_key, by_value = kernel(True, scaling, slope, query, *own, output, lse)
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
    found = agrees(_cuda_kernel, device, dtype, dim, past=0)  # it gets whole sequences
    if not found:
        log.warning("slopes take plain products: no kernel for %s, %d numbers a row", dtype, dim)
    return found


def agrees(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, dim: int, past: int = 200
) -> bool:
    """Whether a kernel gives what plain products give, on a small case, with a past if asked.

    Not all GPUs have the kernel for all rows, and it is not documented: so it is proved where it
    is used.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, tokens: int) -> Tensor:
        shape = (1, heads, tokens, dim)
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    query, slope = draw(4, 100), draw(4, 100)
    key, value = draw(2, past + 100), draw(2, past + 100)
    scaling = dim**-0.5
    try:
        saved = (query, key, value, *causal(query, key, value, scaling))
        found = _kernel_backward(slope, saved, scaling, kernel)
    except torch.OutOfMemoryError:  # fewer heads or tokens may leave room
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


def _summed(heads: Tensor, groups: int) -> Tensor:
    """The sum over the query heads that share a key, shape (B, K, T, D)."""
    return heads.unflatten(1, (-1, groups)).sum(dim=2) if groups > 1 else heads
