"""cuDNN's attention: on a Hopper GPU 1.5 to 2 times as fast as torch's flash kernel.

It makes a plan for every new shape, a twentieth of a second each, and the past of every chunk has
a length of its own: so the past is taken in stretches whose lengths come again.
"""

import functools
import logging
import math

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# The shortest stretch; fewer queries are not worth a plan.
_LEAST = 1024


def takes(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel is for such queries and values, shapes (B, H, C, D) and (B, K, T, D)."""
    device, dtype, dim = query.device, query.dtype, query.shape[-1]
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    if query.shape[2] < _LEAST or dim not in (64, 128) or value.shape[-1] != dim:
        return False
    return _agrees(device, dtype, dim, query.shape[2] % 64 == 0)


def stretches(past: int) -> list[slice]:
    """The past in lengths of 1024 times a power of two, the longest first; and a rest."""
    whole, spans, start = past // _LEAST, [], 0
    for bit in reversed(range(whole.bit_length())):
        if whole >> bit & 1:
            spans.append(slice(start, start + (_LEAST << bit)))
            start = spans[-1].stop
    return [*spans, slice(start, past)] if start < past else spans


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scaling: float
) -> tuple[Tensor, Tensor] | None:
    """Output (B, H, C, D) and log-sum-exp of the scores (B, H, C); None: no plan for the shape.

    As many heads of keys as of queries.
    """
    try:
        output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, scale=scaling
        )
    except torch.OutOfMemoryError:  # a smaller chunk may leave room
        raise
    except RuntimeError as error:
        _say_once(str(error).splitlines()[0])
        return None
    return output, lse.reshape(query.shape[:3])


@functools.cache
def _say_once(why: str) -> None:
    log.warning("torch's flash kernel takes over where cuDNN's attention has none: %s", why)


@functools.cache
def _agrees(device: torch.device, dtype: torch.dtype, dim: int, even: bool) -> bool:
    """Whether the GPU has the kernel, for an even number of queries or an odd one, and it gives
    what float64 gives: with a causal mask, and without one of keys that a larger buffer holds.
    """
    if torch.cuda.get_device_capability(device) < (9, 0):
        return False
    rows = 256 if even else 255
    return all(_exact(device, dtype, dim, rows, *case) for case in ((rows, True), (300, False)))


def _exact(
    device: torch.device, dtype: torch.dtype, dim: int, rows: int, keys: int, causal: bool
) -> bool:
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
        _say_once(f"it is wrong for {dtype}, {dim} numbers a row")
    return agrees
