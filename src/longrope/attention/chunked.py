"""Causal attention of a chunk of queries over all keys so far, without a dense mask.

transformers dispatches every model's attention to one function, found by name. This one gets
the queries of a chunk and the keys of all tokens so far, aligned at the end (bottom-right;
SDPA's ``is_causal`` aligns at the start, which would be wrong). It calls a flash kernel twice,
without a mask on the past and with a causal mask on the chunk, and merges both results by their
log-sum-exp. On a Hopper GPU cuDNN's kernel is used, and the past is split into power-of-two
spans.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longrope.attention import cudnn

# Name under which chunk_attention is registered with transformers.
NAME = "longrope_chunked"

# Block size in keys where no kernel fits and scores are materialised.
_BLOCK = 1024
# Block size in queries where scores are materialised. Under a sliding window it is at most the
# window, as more would compute mostly masked scores, and at least _FEWEST to keep the device busy.
QUERIES, _FEWEST = 2048, 512
# Attention arguments that do not change a plain causal forward pass.
_HARMLESS = {"position_ids", "use_cache", "cache_position", "position_embeddings", "is_causal"}


class Options(NamedTuple):
    """Options of an attention call: score scaling, soft-cap, sliding window and sinks.

    ``sinks`` holds one score per head, shape (H,), which takes a share of the softmax weights and
    has no value (GPT-OSS).
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
    """Compute causal attention of a chunk, the last C of T tokens; transformers calls this.

    Args:
        module: the attention layer (unused).
        query: shape (B, H, C, D).
        key: shape (B, K, T, D), T ≥ C, K dividing H.
        value: shape (B, K, T, D).
        attention_mask: must be None.
        scaling: factor of the scores.
        dropout: ignored.
        sliding_window: number of last tokens that a query sees; None for all.
        softcap: bound c of the scores, c · tanh(score / c); None for no bound.
        s_aux: attention sinks, shape (H,).

    Returns:
        The output, shape (B, C, H, D), and None for the attention weights.

    Raises:
        ValueError: the model passes an attention mask or an unsupported argument.
    """
    check_arguments(attention_mask, others)
    if softcap or s_aux is not None:
        options = Options(scaling, softcap or None, sliding_window, s_aux)
        output, _ = attention_with_lse(query, key, value, options)
    elif sliding_window is not None and sliding_window < key.shape[2]:
        output = _windowed(query, key, value, scaling, sliding_window)
    elif key.shape[2] == query.shape[2]:
        groups = query.shape[1] // key.shape[1]
        output = F.scaled_dot_product_attention(
            query, repeat_kv(key, groups), repeat_kv(value, groups), is_causal=True, scale=scaling
        )
    else:
        output, _ = causal_attention_with_lse(query, key, value, scaling)
    # Most models call contiguous() themselves; some require it.
    return output.transpose(1, 2).contiguous(), None


def query_block_size(window: int | None) -> int:
    """Return the block size in queries of chunked attention that materialises its scores."""
    return QUERIES if window is None else min(QUERIES, max(_FEWEST, window))


def check_arguments(attention_mask: Tensor | None, others: dict[str, Any]) -> None:
    """Refuse attention arguments that chunked attention does not support.

    Raises:
        ValueError: an attention mask, or an argument beyond plain causal attention.
    """
    for name, given in others.items():
        if given is not None and name not in _HARMLESS and not name.startswith("output_"):
            raise ValueError(f"chunked attention does not support the attention argument {name!r}")
    if attention_mask is not None:
        raise ValueError("chunked attention requires unpadded sequences; it got an attention mask")


def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Compute causal attention of a chunk, the last C of T tokens, and its log-sum-exp.

    Args:
        query: shape (B, H, C, D).
        key: shape (B, K, T, D), K dividing H.
        value: shape (B, K, T, D).
        options: scaling, soft-cap, window and sinks.

    Returns:
        The output (B, H, C, D) and the log-sum-exp of the scores (B, H, C), sinks included.
    """
    scaling, softcap, window, sinks = options
    if window is not None and window >= key.shape[2]:
        window = None
    if softcap or window:
        past, parts = key.shape[2] - query.shape[2], []
        for rows in slices(0, query.shape[2], query_block_size(window)):
            seen = slice(0, past + rows.stop)
            q, k, v = query[:, :, rows], key[:, :, seen], value[:, :, seen]
            parts.append(blockwise(q, k, v, scaling, softcap, window))
        output, lse = (torch.cat(each, dim=2) for each in zip(*parts, strict=True))
    else:
        output, lse = causal_attention_with_lse(query, key, value, scaling)
    if sinks is None:
        return output, lse
    exact = torch.promote_types(output.dtype, torch.float32)
    with_sinks = torch.logaddexp(lse.to(exact), sinks.to(exact)[:, None])
    return (output * (lse - with_sinks).exp()[..., None]).to(output.dtype), with_sinks


@contextlib.contextmanager
def attention_implementation(config: Any, name: str) -> Iterator[None]:
    """Switch a decoder to chunked or another registered attention within a ``with`` block.

    Attention then gets no mask.

    Args:
        config: config of the decoder; restored afterwards.
        name: a key of ``AttentionInterface``.
    """
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def slices(first: int, last: int, size: int) -> list[slice]:
    """Split a range of queries or heads into the slices that attention takes at a time.

    The slices go from ``first`` to ``last`` and have at most ``size`` elements.
    """
    return [slice(i, min(i + size, last)) for i in range(first, last, size)]


def causal_attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Compute plain causal attention of a chunk with a flash kernel, and its log-sum-exp.

    Shapes as in :func:`attention_with_lse`; no window, soft-cap or sinks.
    """
    batch, heads, chunk, dim = query.shape
    kv_heads, past = key.shape[1], key.shape[2] - chunk
    groups = heads // kv_heads
    own_key, own_value = key[:, :, past:], value[:, :, past:]
    own_key, own_value = repeat_kv(own_key, groups), repeat_kv(own_value, groups)
    fast = cudnn.supports(query, value)
    output, lse = _flash(query, own_key, own_value, causal=True, scaling=scaling, fast=fast)
    # Without a mask, query heads that share a key head can be folded into rows, so keys and
    # values need no copy per query head.
    folded = query.reshape(batch, kv_heads, groups * chunk, dim)
    exact = torch.promote_types(query.dtype, torch.float32)
    for span in cudnn.power_of_two_spans(past) if fast else [slice(0, past)] if past else []:
        there, there_lse = _flash(
            folded, key[:, :, span], value[:, :, span], causal=False, scaling=scaling, fast=fast
        )
        there = there.reshape(batch, heads, chunk, value.shape[-1]).to(exact)
        there_lse = there_lse.reshape(batch, heads, chunk).to(exact)
        lse = lse.to(exact)
        # exp(lse) / (exp(lse) + exp(there_lse)), the weight of the output so far
        output = torch.lerp(there, output.to(exact), torch.sigmoid(lse - there_lse)[..., None])
        lse = torch.logaddexp(lse, there_lse)
    return output.to(query.dtype), lse


def _flash(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scaling: float, fast: bool
) -> tuple[Tensor, Tensor]:
    """Compute attention and its log-sum-exp (B, H, C) with a flash kernel, else in key blocks.

    ``fast`` tries cuDNN's kernel first.
    """
    if fast and (found := cudnn.attention(query, key, value, causal=causal, scaling=scaling)):
        return found
    ops = torch.ops.aten
    kind, dtype, dim = query.device.type, query.dtype, query.shape[-1]
    half = dtype in (torch.bfloat16, torch.float16)
    if dim != value.shape[-1] or (kind == "cuda" and dim % (8 if half else 4)):
        pass  # kernels require equal key and value sizes; on a GPU rows of whole 16 bytes
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
    """Compute sliding-window attention of a chunk over the keys in the window, with a band mask."""
    chunk, total, most = query.shape[2], key.shape[2], query_block_size(window)
    if chunk > most:  # the mask of a long chunk would be mostly False
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
    """Compute attention with a soft-cap or a window, and its log-sum-exp, by blocks of keys.

    torch has no kernel for these that returns the log-sum-exp. Shapes as in
    :func:`attention_with_lse`.
    """
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
    """Repeat the key or value heads of attention once per query head, giving (B, H, T, D)."""
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
    """Compute attention with an online softmax over blocks of keys, in float32 or better.

    Args:
        query: shape (B, H, C, D).
        key: shape (B, H, T, D).
        value: shape (B, H, T, D).
        scaling: factor of the scores.
        rows: positions of the queries among the keys, shape (C,); None for no causal mask.
        softcap: bound of the scores.
        window: number of last tokens that a query sees.

    Returns:
        The output (B, H, C, D) and the log-sum-exp of the scores (B, H, C).
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
