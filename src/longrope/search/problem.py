"""The three search problems of LongRoPE: search space and starts of each.

Each searches one multiplier per dimension on top of a rescale. They differ in that rescale, in the
bounds, and in the first candidates.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from longrope.models.info import ModelInfo
from longrope.models.target_length import starting_point
from longrope.rope.rescale import Rescale
from longrope.search.space import START_TOKENS, Candidate, Space

# Published methods without training, which a search must not be worse than. A gradient search
# compares the first of them where its budget is small; MrRoPE-Uni is nearly the first ramp.
PUBLISHED = ("yarn", "mrrope-pro", "ntk", "tailspline", "mrrope-uni")
# The starts of the first search. The paper's Algorithm 1 has PI, NTK and YaRN.
STARTS = ("pi", *PUBLISHED)
# The starts of the second search: those of the paper, and our own variant of YaRN's step.
STEP_STARTS = ("pi", "ntk", "yarn", "yarn-log")
# The paper's bound on a factor, as a multiple of the extension (table 4).
MARGIN = 1.25
# Positions of recovery's shrunk starts between 1 and the fine-tuned factors, in log λ.
_SHRUNK = (0.75, 0.5, 0.25)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Search problem: its space, its named starts, and optionally a family of ramps.

    ``ramp`` returns λ = s^ramp for two numbers of rotations within the original length. Dimensions
    with more rotations than the first are not scaled; with fewer than the second they are
    interpolated in full. NTK's factors are the ramp from the fastest to the slowest dimension, PI's
    are its limit, so PI is not compared where there is a ramp.

    ``published`` are methods as published, with their own attention factors, which the result must
    not be worse than.
    """

    space: Space
    starts: dict[str, Candidate]
    ramp: Callable[[float, float], Candidate] | None = None
    published: dict[str, Rescale] = dataclasses.field(default_factory=dict)

    @property
    def compared(self) -> dict[str, Candidate]:
        """The starts that a gradient search compares."""
        return {n: c for n, c in self.starts.items() if n != "pi" or self.ramp is None}


def first_search_problem(
    info: ModelInfo,
    target: int,
    *,
    attention_factor: float | None = None,
    start_tokens: tuple[int, ...] = START_TOKENS,
    max_factor: float | None = None,
) -> Problem:
    """Return the problem of the first search, from the original model to ``target``.

    λ is in [1, 1.25 · s]. The starts are known methods and a family of ramps. An
    ``attention_factor`` that is given holds for the published methods too.
    """
    start = starting_point(info, target, attention_factor)
    space = Space(start, max_factor or MARGIN * start.scale, start_tokens)
    known = {
        name: info.rescale(name, target).replace(start_tokens=start_tokens[0]) for name in STARTS
    }
    rotations = start.original_max_position_embeddings * start.inv_freq / (2 * np.pi)
    rotations = rotations[: space.dimensions]

    def of_rotations(fast: float, slow: float) -> Candidate:
        return space.rounded(start.scale ** ramp(rotations, fast, slow), start_tokens[0])

    return Problem(
        space,
        {name: space.nearest(rescale) for name, rescale in known.items()},
        of_rotations,
        {
            name: known[name]
            if attention_factor is None
            else known[name].replace(attention_factor=attention_factor)
            for name in PUBLISHED
        },
    )


def require_start_tokens(start_tokens: int, info: ModelInfo) -> None:
    """Refuse a search problem with more start tokens than the original length.

    Positions below n̂ are not scaled, so the model must know them.

    Raises:
        ValueError: n̂ is beyond the original length.
    """
    original = info.original_max_position_embeddings
    if original is not None and start_tokens > original:
        raise ValueError(
            f"start_tokens is {start_tokens:,}: positions below it are not rescaled, and the model "
            f"knows {original:,}; give at most so many (the paper's are up to 256)"
        )


def second_search_problem(
    info: ModelInfo,
    finetuned: Rescale,
    target: int,
    *,
    attention_factor: float | None = None,
    max_factor: float | None = None,
) -> Problem:
    """Return the problem of the second search, from a fine-tuned length to ``target``.

    This is section 3.4 of the LongRoPE paper. The multipliers on the fine-tuned factors
    are in [1, 1.25 · s₂], s₂ = target / fine-tuned length. The starts are PI, NTK and YaRN with the
    fine-tuned length as original length.
    """
    if attention_factor is None:
        attention_factor = starting_point(info, target, None).attention_factor
    start = finetuned.replace(max_position_embeddings=target, attention_factor=attention_factor)
    scale = target / finetuned.max_position_embeddings
    space = Space(start, max_factor or MARGIN * scale, (finetuned.start_tokens,))
    return Problem(
        space,
        {
            name: space.nearest(
                multiplied(start, second_search_factors(info, finetuned, name, target))
            )
            for name in STEP_STARTS
        },
    )


def second_search_factors(
    info: ModelInfo, finetuned: Rescale, method: str, target: int
) -> np.ndarray:
    """Return a start of the second search: a method's factors from a fine-tuned length, (d/2,).

    The factors extend the fine-tuned length to ``target``. YaRN's ramp counts rotations within
    the fine-tuned length at the *fine-tuned* frequencies. With unscaled frequencies it would not
    scale dimensions with less than one rotation (perplexity at 16k on the bundled model is then 6
    times the original's instead of equal). ``yarn-log`` is the same ramp as an exponent, s₂^ramp,
    from 32 to 4 rotations; below 4 dimensions are interpolated in full. With 2 instead of 4,
    perplexity at 16k is 1.3% lower but the passkey is lost (docs/log.md).
    """
    if not method.startswith("yarn"):
        step = dataclasses.replace(
            info,
            original_max_position_embeddings=finetuned.max_position_embeddings,
            base_factors=(1.0,) * len(finetuned.factors),
        )
        return np.array(step.rescale(method, target).factors)
    scale = target / finetuned.max_position_embeddings
    rotations = finetuned.max_position_embeddings * finetuned.inv_freq / (2 * np.pi)
    exponent = ramp(rotations, 32.0, 4.0 if method == "yarn-log" else 1.0)
    factors = scale**exponent if method == "yarn-log" else 1 / (exponent / scale + (1 - exponent))
    return np.maximum.accumulate(factors)


def ramp(rotations: np.ndarray, fast: float, slow: float) -> np.ndarray:
    """Return the ramp of a search problem: 0 above ``fast`` rotations, 1 below ``slow``.

    Between, it is linear in the logarithm of the rotations. So is YaRN's ramp, because it is
    linear in the dimension.
    """
    return np.clip(np.log(fast / rotations) / np.log(fast / slow), 0, 1)


def recovery_problem(
    info: ModelInfo, finetuned: Rescale, length: int, attention_factor: float
) -> Problem:
    """Return the problem of the recovery search, for short sequences of an extended model.

    This is section 3.3 of the LongRoPE paper. λ is in [1, 1.25 · the largest fine-tuned
    factor], with the ``attention_factor`` of the long factors. The starts are the original
    factors, the fine-tuned ones, and these shrunk towards 1.
    """
    start = info.rescale("none", length).replace(attention_factor=attention_factor)
    relative = np.divide(finetuned.factors, start.factors)
    space = Space(start, MARGIN * float(relative.max()), (0,))
    starts = {"original": np.ones_like(relative), "fine-tuned": relative}
    starts |= {f"shrunk to {share:g}": np.maximum(relative, 1) ** share for share in _SHRUNK}
    return Problem(
        space,
        {name: space.nearest(multiplied(start, factors)) for name, factors in starts.items()},
    )


def multiplied(start: Rescale, factors: np.ndarray) -> Rescale:
    """Return a search problem's rescale ``start`` with its factors multiplied by others."""
    return start.replace(factors=tuple(np.multiply(start.factors, factors).tolist()))
