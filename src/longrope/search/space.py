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
        """Whether engines can load a search candidate: no checkpoint format has a field for n̂."""
        return self.start_tokens == 0


@dataclasses.dataclass(frozen=True)
class Request:
    """Request to evaluate one candidate of the search space.

    Attributes:
        window: number of the only search window to evaluate; None for all windows.
        grad: whether to return the gradient of the loss with respect to ln λ too.
    """

    candidate: Candidate
    window: int | None = None
    grad: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """Loss of a search-space candidate in nats per token, NaN if not finite, and its gradient.

    ``window_losses`` are those of the single windows, whose mean is ``loss``; empty with a
    gradient, or for a request of one window.
    """

    loss: float
    grad: tuple[float, ...] = ()
    window_losses: tuple[float, ...] = ()


class Evaluate(Protocol):
    """Protocol of a function that evaluates candidates of the search space.

    ``starts`` names candidates for reports. The function raises to end the search.
    """

    def __call__(
        self, requests: Sequence[Request], starts: dict[str, Candidate] | None = None, /
    ) -> list[Result]: ...


@dataclasses.dataclass(frozen=True)
class Space:
    """Search space: the bounds of the candidates, and the :class:`Rescale` of each.

    ``start`` is the rescale that candidates multiply: the identity in a first search. The rescale
    of a candidate has the lengths, ``rope_theta`` and ``attention_factor`` of ``start``, and its
    factors in dimensions that the model does not rotate.
    """

    start: Rescale
    max_factor: float
    start_tokens: tuple[int, ...] = START_TOKENS

    @property
    def dimensions(self) -> int:
        return self.start.rotated

    @property
    def top(self) -> int:
        """Largest factor in the search space, in hundredths."""
        return max(_STEPS, round(self.max_factor * _STEPS))

    def rescale(self, candidate: Candidate) -> Rescale:
        """Return the rescale of a candidate in the search space."""
        factors = np.array(self.start.factors)
        factors[: self.dimensions] *= self.multipliers(candidate)
        return self.start.replace(
            factors=tuple(factors.tolist()), start_tokens=candidate.start_tokens
        )

    def nearest(self, rescale: Rescale) -> Candidate:
        """Return the search-space candidate closest to a rescale: rounded, bounded, monotone."""
        factors = np.array(rescale.factors) / np.array(self.start.factors)
        return self.rounded(factors[: self.dimensions], rescale.start_tokens)

    def rounded(self, factors: np.ndarray, start_tokens: int) -> Candidate:
        """Return the search-space candidate closest to multipliers of shape (dimensions,)."""
        hundredths = np.clip(np.rint(factors * _STEPS), _STEPS, self.top).astype(int)
        return Candidate(tuple(np.maximum.accumulate(hundredths).tolist()), start_tokens)

    def multipliers(self, candidate: Candidate) -> np.ndarray:
        """Return a search candidate's multipliers on the start's factors, shape (dimensions,)."""
        return np.array(candidate.hundredths) / _STEPS

    def contains(self, candidate: Candidate) -> bool:
        """Whether a candidate obeys every bound of the search space."""
        h = candidate.hundredths
        return (
            len(h) == self.dimensions
            and h[0] >= _STEPS
            and h[-1] <= self.top
            and all(a <= b for a, b in itertools.pairwise(h))
            and candidate.start_tokens in self.start_tokens
        )

    def mutate(self, candidate: Candidate, probability: float, rng: random.Random) -> Candidate:
        """Mutate a candidate in the search space: redraw factors and n̂, keep factors monotone.

        Each is redrawn with ``probability``. Adjacent redrawn factors are drawn uniformly between
        the kept factors on either side, then sorted. No draw is rejected, so the mutation rate is
        exactly ``probability``.
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
        """Cross two candidates of the search space: low dimensions of one, high ones of the other.

        n̂ is either parent's. At every cut at least one of the two orders is monotone: if b's
        factor at the cut is below a's before it, then b's before the cut is below a's at it.
        """
        cut = rng.randrange(1, self.dimensions) if self.dimensions > 1 else 0
        if rng.random() < 0.5:
            a, b = b, a
        if cut and a.hundredths[cut - 1] > b.hundredths[cut]:
            a, b = b, a
        tokens = rng.choice((a.start_tokens, b.start_tokens))
        return Candidate(a.hundredths[:cut] + b.hundredths[cut:], tokens)


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return search-space candidates without duplicates, in order of first appearance."""
    return list(dict.fromkeys(candidates))
