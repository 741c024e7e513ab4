"""The three searches of LongRoPE: where each starts, and how far it may go.

All are one search, of a multiplier per dimension on top of a rescale; they differ
in that rescale, in the bounds, and in the first candidates.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from longrope.models.info import ModelInfo
from longrope.models.target import starting_point
from longrope.rope.rescale import Rescale
from longrope.search.space import START_TOKENS, Candidate, Space

# The first population of Algorithm 1, beside their mutants.
STARTS = ("pi", "ntk", "yarn")
# The same for the second search, and our own form of YaRN's step.
STEP_STARTS = (*STARTS, "yarn-log")
# The paper's bound on a factor, as a multiple of the extension (table 4).
MARGIN = 1.25
# How far recovery's shrunk starts lie from 1 to the fine-tuned factors, in log λ.
_SHRUNK = (0.75, 0.5, 0.25)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What one search looks for: its space, its named first candidates, and a family of them.

    ``ramp`` gives λ = s^ramp of two numbers of turns within the original length: what turns more
    often than the first stays as it is, what turns less often than the second is interpolated in
    full. NTK's factors are its member from the fastest dimension to the slowest, PI's its limit;
    "yarn" is among the starts.
    """

    space: Space
    starts: dict[str, Candidate]
    ramp: Callable[[float, float], Candidate] | None = None


def first_search(
    info: ModelInfo,
    target: int,
    *,
    attention_factor: float | None = None,
    start_tokens: tuple[int, ...] = START_TOKENS,
    max_factor: float | None = None,
) -> Problem:
    """From the model as it is to ``target``: λ in [1, 1.25 · s], from PI, NTK, YaRN (or ramps)."""
    start = starting_point(info, target, attention_factor)
    space = Space(start, max_factor or MARGIN * start.scale, start_tokens)
    known = {name: info.rescale(name, target) for name in STARTS}
    turns = start.original_max_position_embeddings * start.inv_freq / (2 * np.pi)
    turns = turns[: space.dimensions]

    def of_turns(fast: float, slow: float) -> Candidate:
        return space.rounded(start.scale ** ramp(turns, fast, slow), start_tokens[0])

    return Problem(
        space,
        {
            name: space.nearest(rescale.replace(start_tokens=start_tokens[0]))
            for name, rescale in known.items()
        },
        of_turns,
    )


def require_start_tokens(start_tokens: int, info: ModelInfo) -> None:
    """Refuse an n̂ under which positions stay unscaled that the model has never seen.

    Raises:
        ValueError: it is beyond the original length.
    """
    original = info.original_max_position_embeddings
    if original is not None and start_tokens > original:
        raise ValueError(
            f"start_tokens is {start_tokens:,}: positions below it are not rescaled, and the model "
            f"knows {original:,}; give at most so many (the paper's are up to 256)"
        )


def second_search(
    info: ModelInfo,
    finetuned: Rescale,
    target: int,
    *,
    attention_factor: float | None = None,
    max_factor: float | None = None,
) -> Problem:
    """From a fine-tuned length to ``target``, without training (section 3.4).

    A multiplier in [1, 1.25 · s₂] on the fine-tuned factors, s₂ = target / fine-tuned
    length; from PI, NTK and YaRN, which take the fine-tuned length for the original.
    """
    if attention_factor is None:
        attention_factor = starting_point(info, target, None).attention_factor
    start = finetuned.replace(max_position_embeddings=target, attention_factor=attention_factor)
    scale = target / finetuned.max_position_embeddings
    space = Space(start, max_factor or MARGIN * scale, (finetuned.start_tokens,))
    return Problem(
        space,
        {
            name: space.nearest(multiplied(start, step_factors(info, finetuned, name, target)))
            for name in STEP_STARTS
        },
    )


def step_factors(info: ModelInfo, finetuned: Rescale, method: str, target: int) -> np.ndarray:
    """A method's factors for the step from a fine-tuned length to ``target``, shape (d/2,).

    YaRN's ramp looks at how often a dimension turns within the fine-tuned length *as it is
    fine-tuned*: by its unscaled frequency it would leave dimensions alone that no longer turn
    once (perplexity at 16k on the bundled model 6 times the original's, against equal).
    ``yarn-log`` is the same ramp as an exponent, s₂^ramp, over dimensions of 32 to 4 turns: what
    turns less than 4 times is interpolated in full. Down to 2 turns perplexity at 16k is 1.3%
    lower, and the pass key is lost (docs/log.md).
    """
    if not method.startswith("yarn"):
        step = dataclasses.replace(
            info,
            original_max_position_embeddings=finetuned.max_position_embeddings,
            base_factors=(1.0,) * len(finetuned.factors),
        )
        return np.array(step.rescale(method, target).factors)
    scale = target / finetuned.max_position_embeddings
    turns = finetuned.max_position_embeddings * finetuned.inv_freq / (2 * np.pi)
    by_turns = ramp(turns, 32.0, 4.0 if method == "yarn-log" else 1.0)
    factors = scale**by_turns if method == "yarn-log" else 1 / (by_turns / scale + (1 - by_turns))
    return np.maximum.accumulate(factors)


def ramp(turns: np.ndarray, fast: float, slow: float) -> np.ndarray:
    """0 for dimensions that turn more than ``fast`` times, 1 below ``slow``; straight in the log.

    YaRN's own is straight in the turns' logarithm too, the dimension's number.
    """
    return np.clip(np.log(fast / turns) / np.log(fast / slow), 0, 1)


def recovery_search(
    info: ModelInfo, finetuned: Rescale, length: int, attention_factor: float
) -> Problem:
    """Factors for short sequences of an extended model (section 3.3).

    λ in [1, 1.25 · the largest fine-tuned one], under the long factors' one
    ``attention_factor``; from the original factors, the fine-tuned ones, and these
    shrunk towards 1.
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
    """``start`` with its factors times others."""
    return start.replace(factors=tuple(np.multiply(start.factors, factors).tolist()))
