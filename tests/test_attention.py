import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from longrope.attention import _online_softmax, causal, chunk_attention, powers


def dense(query, key, value, scaling, window=None, softcap=None):
    """Brute force in float64: every score at once."""
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
    return (scores.masked_fill(~seen, -math.inf).softmax(-1) @ value).transpose(1, 2)


@settings(max_examples=60)
@given(
    chunk=st.integers(1, 40),
    past=st.integers(0, 70),
    kv_heads=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 3]),
    batch=st.integers(1, 2),
    window=st.sampled_from([None, 1, 8, 33, 500]),
    softcap=st.sampled_from([None, 5.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_equals_brute_force(chunk, past, kv_heads, groups, batch, window, softcap, dtype):
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
    output, _ = chunk_attention(
        None, query, key, value, None, scaling=0.3, sliding_window=window, softcap=softcap
    )
    expected = dense(query, key, value, 0.3, window, softcap)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 3e-2}[dtype]
    assert output.dtype == dtype
    assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=60)
@given(past=st.integers(0, 10_000), chunk=st.integers(1, 500))
def test_a_past_in_few_shapes(past, chunk):
    spans = powers(past, chunk)
    assert [s.start for s in spans] == [0, *(s.stop for s in spans)][: len(spans)]
    assert sum(s.stop - s.start for s in spans) == past
    sizes = [s.stop - s.start for s in spans]
    whole = [size for size in sizes if size % chunk == 0]
    assert sizes[: len(whole)] == whole and len(sizes) - len(whole) <= 1
    assert all((size // chunk).bit_count() == 1 for size in whole)
    assert sizes == sorted(set(sizes), reverse=True)


@pytest.mark.parametrize("past", [70, 40, 13])
def test_parts_of_the_past_join(monkeypatch, past):
    monkeypatch.setattr("longrope.attention._spans", lambda q, v, past: powers(past, q.shape[2]))
    query, key, value = (
        torch.randn(2, heads, n, 8) for heads, n in ((4, 10), (2, 10 + past), (2, 10 + past))
    )
    output, lse = causal(query, key, value, 0.3)
    assert_close(
        output.transpose(1, 2).double(), dense(query, key, value, 0.3), rtol=1e-5, atol=1e-5
    )
    monkeypatch.undo()
    assert_close(lse, causal(query, key, value, 0.3)[1])


def test_blocks_of_keys_join(monkeypatch):
    monkeypatch.setattr("longrope.attention._BLOCK", 7)
    query, key, value = (torch.randn(1, 2, n, 8) for n in (5, 40, 40))
    output, lse = _online_softmax(query, key, value, 0.3, rows=torch.arange(35, 40))
    assert_close(
        output.transpose(1, 2).double(), dense(query, key, value, 0.3), rtol=1e-5, atol=1e-5
    )
    scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(
        torch.arange(40)[None] > torch.arange(35, 40)[:, None], -math.inf
    )
    assert_close(lse, scores.logsumexp(-1))


def test_the_unknown_is_refused_by_name():
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(ValueError, match="'s_aux'"):
        chunk_attention(None, q, q, q, None, scaling=1.0, s_aux=torch.zeros(1))
    with pytest.raises(ValueError, match="attention mask"):
        chunk_attention(None, q, q, q, torch.zeros(1, 1, 2, 2), scaling=1.0)
