"""Attention of a chunk of a sequence over everything up to it, without a dense mask.

transformers hands every model's attention to one function, found by name. Ours
gets the queries of a chunk and the keys of all tokens so far, aligned at the end
(bottom-right; SDPA's ``is_causal`` aligns at the start, which is wrong here), and
makes two calls of a flash kernel: the past without a mask, the chunk with a causal
one, merged by their log-sum-exp. On a Hopper GPU the kernel is cuDNN's, and takes the
past in several stretches.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longrope.attention import cudnn

NAME = "longrope_chunked"

# Keys at a time where no kernel fits and the scores are made explicitly.
_BLOCK = 1024
# Queries at a time where scores are made explicitly, or under the band of a sliding window: there
# no more than it has keys, since what they see is a band, but not too few for a machine to be busy.
QUERIES, _FEWEST = 2048, 512
# Attention arguments that change nothing in a plain causal forward.
_HARMLESS = {"position_ids", "use_cache", "cache_position", "position_embeddings", "is_causal"}


class Options(NamedTuple):
    """What attention does beside the scores of queries and keys, of which it scales those.

    ``sinks``: a score for each head, shape (H,), that takes its share of the weights and has no
    value (GPT-OSS).
    """

    scaling: float
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None


def chunk_attention(
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
    """What transformers calls as attention; ``s_aux`` are its sinks.

    Shapes: query (B, H, C, D); key and value (B, K, T, D) with T ≥ C, K dividing H.
    Returns (B, C, H, D).

    Raises:
        ValueError: the model asks for something this attention does not compute.
    """
    refuse_others(attention_mask, others)
    if softcap or s_aux is not None:
        options = Options(scaling, softcap or None, sliding_window, s_aux)
        output, _ = attend(query, key, value, options)
    elif sliding_window is not None and sliding_window < key.shape[2]:
        output = _windowed(query, key, value, scaling, sliding_window)
    elif key.shape[2] == query.shape[2]:
        groups = query.shape[1] // key.shape[1]
        output = F.scaled_dot_product_attention(
            query, repeat_kv(key, groups), repeat_kv(value, groups), is_causal=True, scale=scaling
        )
    else:
        output, _ = causal(query, key, value, scaling)
    # Most models make it so themselves, and some must have it.
    return output.transpose(1, 2).contiguous(), None


def at_once(window: int | None) -> int:
    """Queries whose scores are made together."""
    return QUERIES if window is None else min(QUERIES, max(_FEWEST, window))


def refuse_others(attention_mask: Tensor | None, others: dict[str, Any]) -> None:
    """Refuse what the attention of a chunk does not compute.

    Raises:
        ValueError: a mask, or an argument that changes more than a plain causal forward.
    """
    for name, given in others.items():
        if given is not None and name not in _HARMLESS and not name.startswith("output_"):
            raise ValueError(f"the long forward does not support the attention argument {name!r}")
    if attention_mask is not None:
        raise ValueError("the long forward takes unpadded sequences; it got an attention mask")


def attend(query: Tensor, key: Tensor, value: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Output (B, H, C, D) and log-sum-exp of the scores (B, H, C) of the last C of T tokens."""
    scaling, softcap, window, sinks = options
    if window is not None and window >= key.shape[2]:
        window = None
    if softcap or window:
        past, parts = key.shape[2] - query.shape[2], []
        for rows in slices(0, query.shape[2], at_once(window)):
            seen = slice(0, past + rows.stop)
            q, k, v = query[:, :, rows], key[:, :, seen], value[:, :, seen]
            parts.append(blockwise(q, k, v, scaling, softcap, window))
        output, lse = (torch.cat(each, dim=2) for each in zip(*parts, strict=True))
    else:
        output, lse = causal(query, key, value, scaling)
    if sinks is None:
        return output, lse
    exact = torch.promote_types(output.dtype, torch.float32)
    with_sinks = torch.logaddexp(lse.to(exact), sinks.to(exact)[:, None])
    return (output * (lse - with_sinks).exp()[..., None]).to(output.dtype), with_sinks


@contextlib.contextmanager
def through(config: Any, name: str) -> Iterator[None]:
    """A model of this config attends through what transformers knows by that name, unmasked."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def slices(first: int, last: int, size: int) -> list[slice]:
    """What lies between two numbers, in slices of at most a size."""
    return [slice(i, min(i + size, last)) for i in range(first, last, size)]


def causal(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Output (B, H, C, D) and log-sum-exp of the scores (B, H, C); shapes as above."""
    batch, heads, chunk, dim = query.shape
    kv_heads, past = key.shape[1], key.shape[2] - chunk
    groups = heads // kv_heads
    own_key, own_value = key[:, :, past:], value[:, :, past:]
    own_key, own_value = repeat_kv(own_key, groups), repeat_kv(own_value, groups)
    fast = cudnn.takes(query, value)
    output, lse = _flash(query, own_key, own_value, causal=True, scaling=scaling, fast=fast)
    # Without a mask the queries of the heads that share a key may stand in one row:
    # keys and values need no copy per head.
    folded = query.reshape(batch, kv_heads, groups * chunk, dim)
    exact = torch.promote_types(query.dtype, torch.float32)
    for span in cudnn.stretches(past) if fast else [slice(0, past)] if past else []:
        there, there_lse = _flash(
            folded, key[:, :, span], value[:, :, span], causal=False, scaling=scaling, fast=fast
        )
        there = there.reshape(batch, heads, chunk, value.shape[-1]).to(exact)
        there_lse = there_lse.reshape(batch, heads, chunk).to(exact)
        lse = lse.to(exact)
        # exp(lse) / (exp(lse) + exp(there_lse)), the share of what is in output already
        output = torch.lerp(there, output.to(exact), torch.sigmoid(lse - there_lse)[..., None])
        lse = torch.logaddexp(lse, there_lse)
    return output.to(query.dtype), lse


def _flash(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scaling: float, fast: bool
) -> tuple[Tensor, Tensor]:
    """One kernel call that also gives the log-sum-exp of the scores, shape (B, H, C).

    ``fast``: cuDNN's, if it can.
    """
    if fast and (found := cudnn.attention(query, key, value, causal=causal, scaling=scaling)):
        return found
    ops = torch.ops.aten
    kind, dtype, dim = query.device.type, query.dtype, query.shape[-1]
    half = dtype in (torch.bfloat16, torch.float16)
    if dim != value.shape[-1] or (kind == "cuda" and dim % (8 if half else 4)):
        pass  # no kernel takes keys and values of different sizes, a GPU's no rows off 16 bytes
    elif kind == "cpu":
        return ops._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scaling
        )
    elif kind == "cuda" and half and dim <= 256 and torch.cuda.get_device_capability()[0] >= 8:
        return ops._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scaling
        )[:2]
    elif kind == "cuda" and dtype in (torch.float32, torch.float16):
        output, lse, *_ = ops._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scaling
        )
        return output, lse[..., : query.shape[2]]  # the kernel pads its rows
    rows = torch.arange(query.shape[2], device=query.device) if causal else None
    return _online_softmax(query, key, value, scaling, rows)


def _windowed(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int) -> Tensor:
    """Sliding-window attention: only the keys in reach, under a band no larger than they."""
    chunk, total, most = query.shape[2], key.shape[2], at_once(window)
    if chunk > most:  # the band of a long chunk would be mostly empty
        parts, past = [], total - chunk
        for rows in slices(0, chunk, most):
            seen = slice(0, past + rows.stop)
            near = query[:, :, rows], key[:, :, seen], value[:, :, seen]
            parts.append(_windowed(*near, scaling, window))
        return torch.cat(parts, dim=2)
    reach = max(0, total - chunk - window + 1)
    rows = torch.arange(total - chunk, total, device=query.device)[:, None]
    columns = torch.arange(reach, total, device=query.device)[None, :]
    band = (columns <= rows) & (columns > rows - window)
    groups = query.shape[1] // key.shape[1]
    near_key, near_value = (repeat_kv(t[:, :, reach:], groups) for t in (key, value))
    return F.scaled_dot_product_attention(
        query, near_key, near_value, attn_mask=band, scale=scaling
    )


def blockwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Attention with soft-capped scores, which no kernel of torch has; and their log-sum-exp."""
    batch, heads, chunk, dim = query.shape
    groups = heads // key.shape[1]
    first = key.shape[2] - chunk
    reach = 0 if window is None else max(0, first - window + 1)
    rows = torch.arange(first - reach, key.shape[2] - reach, device=query.device)
    folded = query.reshape(batch, key.shape[1], groups * chunk, dim)
    output, lse = _online_softmax(
        folded,
        key[:, :, reach:],
        value[:, :, reach:],
        scaling,
        rows.repeat(groups),
        softcap,
        window,
    )
    return output.reshape(batch, heads, chunk, value.shape[-1]), lse.reshape(batch, heads, chunk)


def repeat_kv(heads: Tensor, groups: int) -> Tensor:
    """Keys or values once for every query head, shape (B, H, T, D)."""
    return heads.repeat_interleave(groups, dim=1) if groups > 1 else heads


def _online_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    rows: Tensor | None,
    softcap: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax over blocks of keys in one pass; scores in float32 or better.

    ``rows`` are the positions of the queries among the keys, shape (C,); None: no causal mask.
    Returns the output and the log-sum-exp of the scores.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    shape = query.shape[:3]
    total = query.new_zeros(*shape, value.shape[-1], dtype=exact)
    weight = query.new_zeros(*shape, dtype=exact)
    highest = query.new_full(shape, -math.inf, dtype=exact)
    for start in range(0, key.shape[2], _BLOCK):
        block = slice(start, min(start + _BLOCK, key.shape[2]))
        scores = (query @ key[:, :, block].transpose(2, 3)).to(exact) * scaling
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        if rows is not None:
            columns = torch.arange(block.start, block.stop, device=query.device)[None, :]
            seen = columns <= rows[:, None]
            if window is not None:
                seen &= columns > rows[:, None] - window
            scores = scores.masked_fill(~seen, -math.inf)
        top = torch.maximum(highest, scores.amax(dim=-1))
        finite = torch.where(top == -math.inf, 0.0, top)  # a row that has seen no key yet
        shrink = torch.exp(highest - finite)
        scores = torch.exp(scores - finite[..., None])
        weight = weight * shrink + scores.sum(dim=-1)
        total = total * shrink[..., None] + scores @ value[:, :, block].to(exact)
        highest = top
    return (total / weight[..., None]).to(query.dtype), highest + weight.log()
