"""Known RoPE extension methods (PI, NTK, YaRN, ...), as functions that return a ``Rescale``.

All take the model's ``rope_theta``, its rotary dimension, its original length and the target
length, and set the attention factor that their authors use. Where transformers implements the
method, ``inv_freq`` is the same; tests check it.
"""

import math
from collections.abc import Callable

import numpy as np

from longrope.rope.rescale import Rescale, default_inv_freq

Method = Callable[[float, int, int, int], Rescale]


def _rescale(method: str, theta: float, original: int, target: int, factors: np.ndarray, **more):
    """Build the rescale of a known method, with the method's name as provenance."""
    return Rescale(
        factors=tuple(factors.tolist()),
        rope_theta=theta,
        original_max_position_embeddings=original,
        max_position_embeddings=target,
        provenance={"method": method},
        **more,
    )


def identity(rope_theta: float, rotary_dim: int, original: int, target: int) -> Rescale:
    """The ``none`` method, no extension: every factor is 1."""
    return _rescale("none", rope_theta, original, target, np.ones(rotary_dim // 2))


def pi(rope_theta: float, rotary_dim: int, original: int, target: int) -> Rescale:
    """Position interpolation (Chen et al. 2023): every dimension is scaled by s."""
    factors = np.full(rotary_dim // 2, target / original)
    return _rescale("pi", rope_theta, original, target, factors)


def base_change(
    rope_theta: float, rotary_dim: int, original: int, target: int, *, new_theta: float = 1e6
) -> Rescale:
    """Another RoPE base (Code Llama, section 2.3: θ = 10⁶), as factors on the old one."""
    factors = (new_theta / rope_theta) ** (np.arange(0, rotary_dim, 2) / rotary_dim)
    return _rescale("base-change", rope_theta, original, target, factors)


def _ntk_theta(rope_theta: float, rotary_dim: int, scale: float) -> float:
    """The NTK-aware base, θ · s^(d/(d−2))."""
    return rope_theta * scale ** (rotary_dim / (rotary_dim - 2))


def ntk(rope_theta: float, rotary_dim: int, original: int, target: int) -> Rescale:
    """NTK-aware scaling (bloc97 2023): θ · s^(d/(d−2)), so the last dimension is scaled by s."""
    theta = _ntk_theta(rope_theta, rotary_dim, target / original)
    rescale = base_change(rope_theta, rotary_dim, original, target, new_theta=theta)
    return rescale.replace(provenance={"method": "ntk"})


def dynamic_ntk(
    rope_theta: float,
    rotary_dim: int,
    original: int,
    target: int,
    *,
    length: int | None = None,
    factor: float | None = None,
) -> Rescale:
    """Dynamic NTK scaling as in transformers, at a sequence length.

    The scale is s · length / L − (s − 1): s² − s + 1 at the target, and 1 (no change) up to the
    original length.

    Args:
        rope_theta: θ of the model.
        rotary_dim: number of rotated dimensions of a head.
        original: original length L in tokens.
        target: target length in tokens.
        length: sequence length in tokens; default the target.
        factor: s of a checkpoint; default the target divided by L.
    """
    s = factor or target / original
    scale = s * max(target if length is None else length, original) / original - (s - 1)
    theta = _ntk_theta(rope_theta, rotary_dim, scale)
    rescale = base_change(rope_theta, rotary_dim, original, target, new_theta=theta)
    return rescale.replace(provenance={"method": "dynamic-ntk"})


def yarn(
    rope_theta: float,
    rotary_dim: int,
    original: int,
    target: int,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Rescale:
    """YaRN (Peng et al. 2023): a ramp between unscaled and interpolated, temperature 0.1 ln s + 1.

    Dimensions with more than ``beta_fast`` rotations within the original length are unscaled; those
    with fewer than ``beta_slow`` are interpolated. The ramp's ends are rounded outwards, as in
    every implementation.
    """
    s = target / original
    low, high = _ramp_ends(rope_theta, rotary_dim, original, beta_fast, beta_slow)
    high = min(high, rotary_dim - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(rotary_dim // 2) - low) / width, 0, 1)
    factors = 1 / (ramp / s + (1 - ramp))
    return _rescale("yarn", rope_theta, original, target, factors, attention_factor=_temperature(s))


def _ramp_ends(
    rope_theta: float, rotary_dim: int, original: int, beta_fast: float, beta_slow: float
) -> tuple[int, int]:
    """The ends of YaRN's ramp, as numbers of pairs.

    They are the last pair with more than ``beta_fast`` rotations within the original length (at
    least 0), and the first with fewer than ``beta_slow``.
    """

    def dimension(rotations: float) -> float:
        wavelengths = math.log(original / (rotations * 2 * math.pi))
        return rotary_dim * wavelengths / (2 * math.log(rope_theta))

    return max(math.floor(dimension(beta_fast)), 0), math.ceil(dimension(beta_slow))


def _temperature(s: float) -> float:
    """YaRN's attention factor."""
    return 0.1 * math.log(s) + 1 if s > 1 else 1.0


def _of_exponent(
    method: str,
    rope_theta: float,
    rotary_dim: int,
    original: int,
    target: int,
    exponent: Callable[[np.ndarray, float], np.ndarray],
) -> Rescale:
    """λ = s^exponent(q, n): q counts pairs from YaRN's first end, up to n at the second.

    Args:
        exponent: returns 0 at q = 0 and 1 at q = n.
    """
    s, pairs = target / original, rotary_dim // 2
    low, high = _ramp_ends(rope_theta, rotary_dim, original, 32.0, 1.0)
    # Ends that meet make a step after the first.
    n = max(min(high, pairs - 1) - low, 1)
    q = np.clip(np.arange(pairs) - low, 0, n)
    factors = s ** exponent(q, n)
    return _rescale(method, rope_theta, original, target, factors, attention_factor=_temperature(s))


def mrrope_uni(rope_theta: float, rotary_dim: int, original: int, target: int) -> Rescale:
    """MrRoPE-Uni (arXiv 2601.22181): YaRN's ramp as an exponent, s^(q/n)."""
    return _of_exponent("mrrope-uni", rope_theta, rotary_dim, original, target, lambda q, n: q / n)


def mrrope_pro(rope_theta: float, rotary_dim: int, original: int, target: int) -> Rescale:
    """MrRoPE-Pro (arXiv 2601.22181): the exponent grows by steps that grow, q(q+1) / (n(n+1))."""

    def exponent(q: np.ndarray, n: float) -> np.ndarray:
        return q * (q + 1) / (n * (n + 1))

    return _of_exponent("mrrope-pro", rope_theta, rotary_dim, original, target, exponent)


def tailspline(rope_theta: float, rotary_dim: int, original: int, target: int) -> Rescale:
    """TailSpline (a public repository, no paper): q(3n² + 3n + 1 − q²) / (n(n+1)(2n+1))."""

    def exponent(q: np.ndarray, n: float) -> np.ndarray:
        return q * (3 * n**2 + 3 * n + 1 - q**2) / (n * (n + 1) * (2 * n + 1))

    return _of_exponent("tailspline", rope_theta, rotary_dim, original, target, exponent)


def llama3(
    rope_theta: float,
    rotary_dim: int,
    original: int,
    target: int,
    *,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
) -> Rescale:
    """Llama 3.1 scaling: a ramp over the number of rotations within the original length."""
    s = target / original
    inv_freq = default_inv_freq(rope_theta, rotary_dim)
    rotations = original * inv_freq / (2 * math.pi)
    ramp = np.clip((rotations - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    factors = 1 / ((1 - ramp) / s + ramp)
    return _rescale("llama3", rope_theta, original, target, factors)


METHODS: dict[str, Method] = {
    "none": identity,
    "pi": pi,
    "ntk": ntk,
    "dynamic-ntk": dynamic_ntk,
    "yarn": yarn,
    "mrrope-uni": mrrope_uni,
    "mrrope-pro": mrrope_pro,
    "tailspline": tailspline,
    "llama3": llama3,
    "base-change": base_change,
}
