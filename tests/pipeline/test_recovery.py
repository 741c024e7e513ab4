"""The choice between two sets of short factors."""

import numpy as np
import pytest

from longrope.layerwise.forward import LongForward
from longrope.pipeline.recovery import choose
from longrope.rope.apply import rescaled
from longrope.rope.rescale import Rescale

SHORT = (64, 128)


def rescale(factor: float, length: int, attention_factor: float = 1.2) -> Rescale:
    factors = tuple(np.linspace(1, factor, 8))
    return Rescale(factors, 1e4, 64, length, attention_factor)


@pytest.fixture
def forward(micro_models):
    return LongForward(micro_models("llama"))


@pytest.fixture
def windows():
    rng = np.random.default_rng(0)
    return {length: rng.integers(3, 1500, (2, length)) for length in SHORT}


def loss(forward, rescale, ids):
    with rescaled(forward.model, rescale):
        return float(np.mean([losses.mean() for losses in forward.batches(ids)]))


def test_each_set_is_judged_at_both_lengths_by_what_its_model_does(forward, windows):
    long = rescale(9, 512)
    candidates = [rescale(1, 64), rescale(4, 128)]
    found = choose(forward, windows, candidates, long, free_attention_factor=1.0)
    beyond = {length: loss(forward, long, ids) for length, ids in windows.items()}
    first = [loss(forward, candidates[0], windows[64]), beyond[128]]
    second = [loss(forward, candidates[1], windows[length]) for length in SHORT]
    assert list(found.losses[64].values()) == pytest.approx(first, abs=1e-5)
    assert list(found.losses[128].values()) == pytest.approx(second, abs=1e-5)
    best = min(candidates, key=lambda c: np.mean(first if c is candidates[0] else second))
    assert found.short.factors == best.factors
    assert found.without == pytest.approx(beyond, abs=1e-5)


@pytest.mark.parametrize(("own", "free"), [(1.2, 0.8), (0.8, 1.2)])
def test_what_a_free_attention_factor_gains_is_noted_where_it_gains(forward, windows, own, free):
    """On this model 0.8 has the lower loss of the two."""
    at = {a: loss(forward, rescale(1, 64, a), windows[64]) for a in (0.8, 1.2)}
    assert at[0.8] < at[1.2]
    candidate = rescale(1, 64, own)
    found = choose(forward, windows, [candidate], rescale(9, 512), free_attention_factor=free)
    assert (found.free, found.shared) == pytest.approx((at[free], at[own]), abs=1e-5)
    assert found.short_attention_factor == (0.8 if free == 0.8 else None)
    assert found.short.attention_factor == own
