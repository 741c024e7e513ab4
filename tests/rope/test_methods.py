import math

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longrope.rope import methods
from longrope.rope.rescale import Rescale

SHAPES = [
    # theta, head_dim, partial rotary factor, original, scale
    (10000.0, 64, 1.0, 256, 8.0),
    (10000.0, 128, 1.0, 4096, 2.0),
    (500000.0, 128, 1.0, 8192, 16.0),
    (100000.0, 64, 0.5, 8192, 4.0),
    (10000.0, 80, 0.25, 2048, 3.5),
]


def theirs(rope_type: str, shape, seq_len=None, **more):
    theta, head_dim, partial, original, scale = shape
    target = int(original * scale)
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=original if rope_type == "dynamic" else target,
        rope_parameters={
            "rope_type": rope_type,
            "rope_theta": theta,
            "factor": scale,
            "partial_rotary_factor": partial,
            "original_max_position_embeddings": original,
            **more,
        },
    )
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](config, "cpu", seq_len=seq_len)
    return inv_freq.numpy(), attention_factor


def ours(method, shape, **more) -> Rescale:
    theta, head_dim, partial, original, scale = shape
    return method(theta, int(head_dim * partial), original, int(original * scale), **more)


def assert_equal(rescale: Rescale, expected):
    inv_freq, attention_factor = expected
    np.testing.assert_allclose(rescale.inv_freq, inv_freq, rtol=1e-5)
    assert rescale.attention_factor == pytest.approx(attention_factor, rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_pi_is_linear(shape):
    assert_equal(ours(methods.pi, shape), theirs("linear", shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("part", [0.5, 1.0, 1.5, None])
def test_dynamic_ntk(shape, part):
    original, scale = shape[3], shape[4]
    length = None if part is None else int(original * scale * part)
    seq_len = int(original * scale) if length is None else length
    assert_equal(
        ours(methods.dynamic_ntk, shape, length=length), theirs("dynamic", shape, seq_len=seq_len)
    )


def test_dynamic_ntk_scale_at_the_target():
    rescale = ours(methods.dynamic_ntk, SHAPES[0])
    assert rescale.factors[-1] == pytest.approx(8**2 - 8 + 1)


def test_dynamic_ntk_leaves_short_sequences():
    rescale = ours(methods.dynamic_ntk, SHAPES[0], length=200)
    assert set(rescale.factors) == {1.0}


@pytest.mark.parametrize("shape", SHAPES)
def test_yarn(shape):
    assert_equal(ours(methods.yarn, shape), theirs("yarn", shape))


@pytest.mark.parametrize("betas", [(32, 1), (16, 2), (64, 0.5)])
def test_yarn_betas(betas):
    fast, slow = betas
    assert_equal(
        ours(methods.yarn, SHAPES[1], beta_fast=fast, beta_slow=slow),
        theirs("yarn", SHAPES[1], beta_fast=fast, beta_slow=slow),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bounds", [(1.0, 4.0), (2.0, 8.0)])
def test_llama3(shape, bounds):
    low, high = bounds
    assert_equal(
        ours(methods.llama3, shape, low_freq_factor=low, high_freq_factor=high),
        theirs("llama3", shape, low_freq_factor=low, high_freq_factor=high),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_any_rescale_is_their_longrope(shape):
    rescale = ours(methods.yarn, shape)
    original = shape[3]
    expected = theirs(
        "longrope",
        shape,
        seq_len=original + 1,
        long_factor=list(rescale.factors),
        short_factor=[1.0] * len(rescale.factors),
        attention_factor=rescale.attention_factor,
    )
    assert_equal(rescale, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_static_ntk_is_the_formula(shape):
    theta, head_dim, partial, _, scale = shape
    d = int(head_dim * partial)
    base = theta * scale ** (d / (d - 2))
    expected = [base ** (-2 * i / d) for i in range(d // 2)]
    rescale = ours(methods.ntk, shape)
    np.testing.assert_allclose(rescale.inv_freq, expected, rtol=1e-12)
    assert rescale.factors[0] == 1
    assert rescale.factors[-1] == pytest.approx(scale)
    assert rescale.attention_factor == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_base_change_is_the_formula(shape):
    d = int(shape[1] * shape[2])
    expected = [math.exp(-math.log(1e6) * 2 * i / d) for i in range(d // 2)]
    rescale = ours(methods.base_change, shape)
    np.testing.assert_allclose(rescale.inv_freq, expected, rtol=1e-12)


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_every_method_says_what_it_is(name):
    rescale = methods.METHODS[name](10000.0, 64, 256, 2048)
    assert rescale.provenance == {"method": name}
    assert rescale.portable
    assert min(rescale.factors) >= 1


def exponents(shape, of_step) -> list[float]:
    """Exponents of s by pair, from rotations that are counted one pair at a time."""
    theta, head_dim, partial, original, _ = shape
    d = int(head_dim * partial)
    rotations = [original / (2 * math.pi * theta ** (2 * i / d)) for i in range(d // 2)]
    last_fast = max([i for i, r in enumerate(rotations) if r > 32], default=0)
    first_slow = min([i for i, r in enumerate(rotations) if r < 1], default=d // 2 - 1)
    n = first_slow - last_fast
    return [of_step(min(max(i - last_fast, 0), n), n) for i in range(d // 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "weights"),
    [
        # The steps of the exponent, from one pair to the next, are in these proportions.
        ("mrrope-uni", lambda k, n: 1),
        ("mrrope-pro", lambda k, n: k),
        ("tailspline", lambda k, n: n * (n + 1) - k * (k - 1)),
    ],
)
def test_forms_that_are_powers_of_the_scale(name, weights, shape):
    def of_step(q, n):
        return sum(weights(k, n) for k in range(1, q + 1)) / sum(
            weights(k, n) for k in range(1, n + 1)
        )

    rescale = ours(methods.METHODS[name], shape)
    scale = shape[4]
    np.testing.assert_allclose(
        rescale.factors, [scale**e for e in exponents(shape, of_step)], rtol=1e-9
    )
    assert rescale.factors[0] == 1
    assert rescale.factors[-1] == pytest.approx(scale)
    assert rescale.attention_factor == ours(methods.yarn, shape).attention_factor


@pytest.mark.parametrize("name", ["mrrope-uni", "mrrope-pro", "tailspline"])
@pytest.mark.parametrize("original", [8, 64, 10**9])
def test_ramp_ends_that_meet_make_a_step(name, original):
    factors = methods.METHODS[name](10000.0, 8, original, 4 * original).factors
    assert np.isfinite(factors).all()
    assert (np.diff(factors) >= 0).all()
