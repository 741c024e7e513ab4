"""cuDNN attention kernel, 1.5 to 2 times as fast as torch's flash kernel on Hopper GPUs.

cuDNN builds a plan for each new shape, which takes about 50 ms, and each chunk of a sequence
has a past of another length. So the past is split into power-of-two spans, and few shapes occur.
"""

import functools
import logging
import math

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Shortest span in tokens, and fewest queries for which a plan pays off.
_LEAST = 1024


def supports(query: Tensor, value: Tensor) -> bool:
    """Whether cuDNN attention supports these queries (B, H, C, D) and values (B, K, T, D)."""
    device, dtype, dim = query.device, query.dtype, query.shape[-1]
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    if query.shape[2] < _LEAST or dim not in (64, 128) or value.shape[-1] != dim:
        return False
    return _verified(device, dtype, dim, query.shape[2] % 64 == 0)


def power_of_two_spans(past: int) -> list[slice]:
    """Split past keys into spans of 1024 · 2ⁿ for cuDNN, longest first, and a remainder."""
    whole, spans, start = past // _LEAST, [], 0
    for bit in reversed(range(whole.bit_length())):
        if whole >> bit & 1:
            spans.append(slice(start, start + (_LEAST << bit)))
            start = spans[-1].stop
    return [*spans, slice(start, past)] if start < past else spans


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scaling: float
) -> tuple[Tensor, Tensor] | None:
    """Call cuDNN's attention kernel; None where cuDNN has no plan for the shape.

    Args:
        query: shape (B, H, C, D).
        key: shape (B, H, T, D), as many heads as the query.
        value: shape (B, H, T, D).
        causal: whether to apply a causal mask.
        scaling: factor of the scores.

    Returns:
        The output (B, H, C, D) and the log-sum-exp of the scores (B, H, C), or None.
    """
    try:
        output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, scale=scaling
        )
    except torch.OutOfMemoryError:  # the caller retries with a smaller chunk
        raise
    except RuntimeError as error:
        _warn_once(str(error).splitlines()[0])
        return None
    return output, lse.reshape(query.shape[:3])


@functools.cache
def _warn_once(why: str) -> None:
    """Warn once per reason that cuDNN attention is replaced by torch's kernel."""
    log.warning("cuDNN attention is unavailable (%s): using torch's flash kernel", why)


@functools.cache
def _verified(device: torch.device, dtype: torch.dtype, dim: int, even: bool) -> bool:
    """Whether the GPU has cuDNN's kernel and it agrees with float64 on a small case.

    Checked with a causal mask, and without one on a slice of a larger key buffer, for an even or
    an odd number of queries.
    """
    if torch.cuda.get_device_capability(device) < (9, 0):
        return False
    rows = 256 if even else 255
    return all(_exact(device, dtype, dim, rows, *case) for case in ((rows, True), (300, False)))


def _exact(
    device: torch.device, dtype: torch.dtype, dim: int, rows: int, keys: int, causal: bool
) -> bool:
    """Whether cuDNN's output and log-sum-exp agree with float64 attention."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 2, tokens, dim, generator=generator, device="cpu").to(device, dtype)
        for tokens in (rows, 700, 700)
    )
    key, value, scaling = key[:, :, :keys], value[:, :, :keys], dim**-0.5
    found = attention(query, key, value, causal=causal, scaling=scaling)
    if found is None:
        return False
    scores = query.double() @ key.double().transpose(2, 3) * scaling
    if causal:
        scores += torch.full_like(scores, -math.inf).triu(1)
    output, lse = scores.softmax(-1) @ value.double(), scores.logsumexp(-1)
    near = (found[0] - output).norm() < 2 * torch.finfo(dtype).eps * output.norm()
    agrees = bool(near) and torch.allclose(found[1].double(), lse, atol=1e-4)
    if not agrees:
        _warn_once(f"wrong results for {dtype}, head dimension {dim}")
    return agrees
