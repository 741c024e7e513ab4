"""The search space: candidates, mutation and crossover, and requests for evaluations.

LongRoPE's space (table 4): factors λ in [1, 1.25 · s] in steps of 0.01 that never
decrease with the dimension, and a number n̂ of start tokens from a fixed set.
"""

import dataclasses
import itertools
import random
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from longrope.rope.rescale import Rescale

START_TOKENS = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)
_STEPS = 100  # a factor is a whole number of hundredths, so that equal means equal


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One point of the search space: factors in hundredths, and the start tokens n̂."""

    hundredths: tuple[int, ...]
    start_tokens: int = 0

    @property
    def portable(self) -> bool:
        """Whether inference engines can load it: no checkpoint format has a field for n̂."""
        return self.start_tokens == 0


@dataclasses.dataclass(frozen=True)
class Request:
    """One evaluation of a candidate.

    Attributes:
        window: number of the only search window to evaluate; None for all windows.
        grad: whether the gradient of the loss by ln λ is requested too.
    """

    candidate: Candidate
    window: int | None = None
    grad: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """The loss of a request in nats per token, NaN if not finite, and the requested gradient."""

    loss: float
    grad: tuple[float, ...] = ()


class Evaluate(Protocol):
    """Evaluates requests; ``starts`` names candidates for reports. Raises to end the search."""

    def __call__(
        self, requests: Sequence[Request], starts: dict[str, Candidate] | None = None, /
    ) -> list[Result]: ...


@dataclasses.dataclass(frozen=True)
class Space:
    """The bounds of one search, and the :class:`Rescale` of each candidate.

    ``start`` is the rescale that candidates multiply: the identity in a first search. Every
    candidate has its lengths, ``rope_theta`` and ``attention_factor``, and its factors in
    dimensions that the model does not rotate.
    """

    start: Rescale
    max_factor: float
    start_tokens: tuple[int, ...] = START_TOKENS

    @property
    def dimensions(self) -> int:
        return self.start.rotated

    @property
    def top(self) -> int:
        """The largest factor, in hundredths."""
        return max(_STEPS, round(self.max_factor * _STEPS))

    def rescale(self, candidate: Candidate) -> Rescale:
        """Return the rescale of a candidate."""
        factors = np.array(self.start.factors)
        factors[: self.dimensions] *= self.multipliers(candidate)
        return self.start.replace(
            factors=tuple(factors.tolist()), start_tokens=candidate.start_tokens
        )

    def nearest(self, rescale: Rescale) -> Candidate:
        """Return the candidate closest to a rescale: rounded, bounded, and made monotone."""
        factors = np.array(rescale.factors) / np.array(self.start.factors)
        return self.rounded(factors[: self.dimensions], rescale.start_tokens)

    def rounded(self, factors: np.ndarray, start_tokens: int) -> Candidate:
        """Return the candidate closest to multipliers of shape (dimensions,)."""
        hundredths = np.clip(np.rint(factors * _STEPS), _STEPS, self.top).astype(int)
        return Candidate(tuple(np.maximum.accumulate(hundredths).tolist()), start_tokens)

    def multipliers(self, candidate: Candidate) -> np.ndarray:
        """Return the multipliers of a candidate on the start's factors, shape (dimensions,)."""
        return np.array(candidate.hundredths) / _STEPS

    def contains(self, candidate: Candidate) -> bool:
        """Whether a candidate obeys every bound of the space."""
        h = candidate.hundredths
        return (
            len(h) == self.dimensions
            and h[0] >= _STEPS
            and h[-1] <= self.top
            and all(a <= b for a, b in itertools.pairwise(h))
            and candidate.start_tokens in self.start_tokens
        )

    def mutate(self, candidate: Candidate, probability: float, rng: random.Random) -> Candidate:
        """Redraw each factor and n̂ with a probability, keeping factors monotone.

        A run of redrawn factors is drawn uniformly, in order, between the factors on
        either side of it that stay: the uniform distribution over all candidates that
        share the rest. So no draw is ever rejected and the rate is the one stated.
        """
        drawn: list[int | None] = [
            None if rng.random() < probability else value for value in candidate.hundredths
        ]
        result: list[int] = []
        position = 0
        while position < len(drawn):
            value = drawn[position]
            if value is not None:
                result.append(value)
                position += 1
                continue
            end = position
            while end < len(drawn) and drawn[end] is None:
                end += 1
            low = result[-1] if result else _STEPS
            high = drawn[end] if end < len(drawn) else self.top
            assert high is not None
            result += sorted(rng.randint(low, high) for _ in range(position, end))
            position = end
        tokens = candidate.start_tokens
        if rng.random() < probability:
            tokens = rng.choice(self.start_tokens)
        return Candidate(tuple(result), tokens)

    def cross(self, a: Candidate, b: Candidate, rng: random.Random) -> Candidate:
        """Join the low dimensions of one parent with the high ones of the other; n̂ of either.

        At every cut at least one way round is monotone: if b's factor at the cut lies
        below a's before it, then b's before the cut lies below a's at it.
        """
        cut = rng.randrange(1, self.dimensions) if self.dimensions > 1 else 0
        if rng.random() < 0.5:
            a, b = b, a
        if cut and a.hundredths[cut - 1] > b.hundredths[cut]:
            a, b = b, a
        tokens = rng.choice((a.start_tokens, b.start_tokens))
        return Candidate(a.hundredths[:cut] + b.hundredths[cut:], tokens)


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return candidates without repetition, in order of first appearance."""
    return list(dict.fromkeys(candidates))
