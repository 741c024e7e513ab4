import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from longrope.attention import cudnn
from longrope.attention.chunked import _online_softmax, causal_attention_with_lse, chunk_attention


def dense(query, key, value, scaling, window=None, softcap=None, sinks=None):
    """Attention by brute force in float64, with all scores."""
    query, key, value = (t.double() for t in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    total, chunk = key.shape[2], query.shape[2]
    rows = torch.arange(total - chunk, total)[:, None]
    columns = torch.arange(total)[None, :]
    seen = columns <= rows
    if window:
        seen &= columns > rows - window
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:  # a column that has no value
        sink = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2)


@settings(max_examples=60)
@given(
    chunk=st.integers(1, 40),
    past=st.integers(0, 70),
    kv_heads=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 3]),
    batch=st.integers(1, 2),
    window=st.sampled_from([None, 1, 8, 33, 500]),
    softcap=st.sampled_from([None, 5.0]),
    with_sinks=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_equals_brute_force(
    chunk, past, kv_heads, groups, batch, window, softcap, with_sinks, dtype
):
    generator = torch.Generator().manual_seed(chunk * 100 + past)
    shapes = [
        (batch, heads, tokens, 16)
        for heads, tokens in (
            (kv_heads * groups, chunk),
            (kv_heads, chunk + past),
            (kv_heads, chunk + past),
        )
    ]
    query, key, value = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    sinks = torch.randn(kv_heads * groups, generator=generator).to(dtype) if with_sinks else None
    options = {"sliding_window": window, "softcap": softcap, "s_aux": sinks}
    output, _ = chunk_attention(None, query, key, value, None, scaling=0.3, **options)
    expected = dense(query, key, value, 0.3, window, softcap, sinks)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 3e-2}[dtype]
    assert output.dtype == dtype
    assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=60)
@given(past=st.integers(0, 3_000_000))
def test_power_of_two_spans_cover_the_past(past):
    spans = cudnn.power_of_two_spans(past)
    assert [s.start for s in spans] == [0, *(s.stop for s in spans)][: len(spans)]
    assert sum(s.stop - s.start for s in spans) == past
    sizes = [s.stop - s.start for s in spans]
    whole = [size for size in sizes if size >= 1024]
    assert all(size % 1024 == 0 and (size // 1024).bit_count() == 1 for size in whole)
    assert sizes == sorted(set(sizes), reverse=True) and len(sizes) - len(whole) <= 1


@pytest.mark.parametrize("past", [70, 40, 13, 0])
def test_spans_of_the_past_are_merged(monkeypatch, past):
    query, key, value = (
        torch.randn(2, heads, n, 8) for heads, n in ((4, 10), (2, 10 + past), (2, 10 + past))
    )
    whole = causal_attention_with_lse(query, key, value, 0.3)
    taken = []
    monkeypatch.setattr(cudnn, "supports", lambda *_: True)
    monkeypatch.setattr(cudnn, "_LEAST", 10)
    # cuDNN has no plan, so torch's flash kernel runs on each span.
    monkeypatch.setattr(cudnn, "attention", lambda q, k, v, **_: taken.append(k.shape[2]))
    output, lse = causal_attention_with_lse(query, key, value, 0.3)
    assert taken == [10, *(s.stop - s.start for s in cudnn.power_of_two_spans(past))]
    assert_close(
        output.transpose(1, 2).double(), dense(query, key, value, 0.3), rtol=1e-5, atol=1e-5
    )
    assert_close(lse, whole[1])


def test_a_missing_plan_is_warned_of_once(caplog, monkeypatch):
    """The operator exists, but there is no GPU."""
    monkeypatch.setattr(cudnn, "_warn_once", cudnn._warn_once.__wrapped__)
    query = torch.randn(1, 2, 8, 64, dtype=torch.bfloat16)
    assert not cudnn.supports(query, query)
    assert cudnn.attention(query, query, query, causal=True, scaling=0.3) is None
    assert "cuDNN" in caplog.text


def test_a_long_chunk_under_a_window_is_split(monkeypatch):
    query, key, value = (torch.randn(1, 2, n, 8) for n in (30, 41, 41))
    whole, _ = chunk_attention(None, query, key, value, None, scaling=0.3, sliding_window=5)
    monkeypatch.setattr("longrope.attention.chunked.QUERIES", 7)
    parts, _ = chunk_attention(None, query, key, value, None, scaling=0.3, sliding_window=5)
    assert_close(parts, whole)


def test_blocks_of_keys_are_merged(monkeypatch):
    monkeypatch.setattr("longrope.attention.chunked._BLOCK", 7)
    query, key, value = (torch.randn(1, 2, n, 8) for n in (5, 40, 40))
    output, lse = _online_softmax(query, key, value, 0.3, rows=torch.arange(35, 40))
    assert_close(
        output.transpose(1, 2).double(), dense(query, key, value, 0.3), rtol=1e-5, atol=1e-5
    )
    scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(
        torch.arange(40)[None] > torch.arange(35, 40)[:, None], -math.inf
    )
    assert_close(lse, scores.logsumexp(-1))


def test_unsupported_arguments_are_refused_by_name():
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(ValueError, match="'position_bias'"):
        chunk_attention(None, q, q, q, None, scaling=1.0, position_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="attention mask"):
        chunk_attention(None, q, q, q, torch.zeros(1, 1, 2, 2), scaling=1.0)
