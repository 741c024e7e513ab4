"""The fast search: steps down the loss's slope inside the monotone constraint.

One backward pass says of every factor at once how the loss changes with it, for the price
of three forwards; Algorithm 1 learns one number from each. Every step takes the slope on one
search window alone, in turn, so a step costs a fraction of a whole evaluation.
"""

import dataclasses
import logging
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from longrope.search.problem import Problem
from longrope.search.ramps import walk
from longrope.search.settings import LEAST_BUDGET, GradientSearchConfig
from longrope.search.space import Candidate, Outcome, Price, Trial, distinct

log = logging.getLogger(__name__)

# Adam's averages forget fast: a search has some thirty steps.
_BETA1, _BETA2 = 0.8, 0.95
# Slopes smaller than this, in nats per unit of ln λ, move a factor less than the full rate.
_SMALL = 3e-3
# A slope counts for no more than this: Adam's average of squares would remember it too long.
_CLIP = 0.5
# So many times the rate where there is one window: each slope is the whole's, and steps are few.
_SURE = 3
# What of a slope goes to each neighbour: they mean much the same, and their noise is their own.
_SHARED = 0.1
# What turns more often within the original length stays where it starts: its slopes are large,
# and of either sign from window to window.
_TURNS = 16
# What of the budget YaRN and the ramps may take; forward equivalents for comparing other starts.
_BEGINNING = 0.3
_COMPARED = 2
# The last share of the steps, whose mean is a finalist beside the last point (not of one window).
_TAIL = 0.3
# With so few windows ramps are tried on all, and start tokens cost what is better for steps.
_FEW = 2
# What sums of prices may be off by.
_ROUNDING = 1e-9
# Start tokens tried on the result, where the space has them.
_START_TOKENS = (4, 8, 16, 32)


class GradientSearch:
    """Ask for trials, tell their outcomes, until ``done``; as ``Evolution`` does.

    On some windows the starts are compared, or where the problem has ramps, YaRN and these. From
    the best, Adam's steps in ln λ (slope on one window after the other, or a few; the rate falls to
    0 over the second half), each followed by the nearest monotone point (isotonic regression). Then
    the last point and the mean of the last steps are evaluated on all windows, and n̂ > 0 is tried
    where the space has it. With few windows these cost too much: n̂ is not tried with two, and with
    one the last point alone is evaluated.

    ``starts``: the first candidates by name, ramps as they are tried.
    """

    def __init__(self, problem: Problem, settings: GradientSearchConfig, seed: int, price: Price):
        self.problem, self.settings, self.price = problem, settings, price
        self.space = space = problem.space
        names = ("yarn",) if problem.ramp else tuple(problem.starts)
        self.starts = {name: problem.starts[name] for name in names}
        self.generation = 0
        self.done = False
        self._told: dict[Trial, None] = {}  # in order: sums must be the same in every process
        self._rng = random.Random(seed)
        self._order: list[int] = []
        turns = space.start.original_max_position_embeddings * space.start.inv_freq / (2 * np.pi)
        self._fixed = int((turns > _TURNS).sum())
        self._point = np.zeros(space.dimensions)
        self._mean, self._square = np.zeros_like(self._point), np.zeros_like(self._point)
        self._last: list[np.ndarray] = []
        self._steps, self._step = 0, 0
        self._asked: list[Trial] = []
        self._phase = self._course()
        self._next()

    def ask(self) -> list[Trial]:
        """The next trials; they do not depend on each other."""
        return self._asked

    def tell(self, trials: Sequence[Trial], outcomes: Sequence[Outcome]) -> None:
        """Outcomes of the trials asked for; NaN and infinity lose to every number."""
        self.generation += 1
        self._told |= dict.fromkeys(trials)
        self._next([outcome for _, outcome in zip(trials, outcomes, strict=True)])

    def _next(self, outcomes: Sequence[Outcome] | None = None) -> None:
        try:
            self._asked = next(self._phase) if outcomes is None else self._phase.send(outcomes)
        except StopIteration:
            self.done, self._asked = True, []

    def _course(self) -> Any:
        """The whole search, a generator of trials that is sent their outcomes."""
        begin = yield from self._beginning()
        yield [Trial(begin)]
        self._point = np.log(self.space.multipliers(begin))
        tokens = [n for n in _START_TOKENS if n in self.space.start_tokens]
        tokens = tokens if begin.portable and self.price.parts > _FEW else []
        # Gemma 4's dimensions all turn often: there is nothing to go down.
        free = self._fixed < self.space.dimensions
        self._steps = self._affordable(len(tokens)) if free else 0
        for _ in range(self._steps):
            here = self._here(begin)
            parts = dict.fromkeys(self._part() for _ in range(self.settings.windows_per_step))
            outcomes = yield [Trial(here, part, slope=True) for part in parts]
            self._move(outcomes)
        if not self._steps:
            if free:
                log.warning(
                    "a budget of %s forwards leaves none for a step after the starts are compared: "
                    "the best of them is kept",
                    self.settings.budget,
                )
            return
        finalists = [self._here(begin)]
        if not self._alone:  # a slope on the whole has no noise to average
            mean = self._monotone(np.mean(self._last, axis=0))
            finalists = distinct([*finalists, self._candidate(mean, begin)])
        found = yield from self._best(finalists, (None,))
        if tokens:
            others = [dataclasses.replace(found, start_tokens=n) for n in (0, *tokens)]
            best = yield from self._best(others, (0,))
            if best != found:
                yield [Trial(best)]

    def _beginning(self) -> Any:
        """The best of the starts, and of ramps while their share of the budget lasts."""
        losses = yield from self._compare(list(self.starts.values()), self._some)
        one = 1.0 if self._some == (None,) else len(self._some) / self.price.parts
        share = max(LEAST_BUDGET - 1, _BEGINNING * self.settings.budget)
        ramps, loss = walk(), None
        while self.problem.ramp and self._spent + one <= share + _ROUNDING:
            try:
                turns = next(ramps) if loss is None else ramps.send(loss)
            except StopIteration:
                break
            ramp = self.problem.ramp(*turns)
            self.starts["ramp {:g}-{:g}".format(*turns)] = ramp
            losses |= yield from self._compare([ramp], self._some)
            loss = losses[ramp]
        return min(losses, key=losses.__getitem__)

    def _best(self, candidates: list[Candidate], parts: Sequence[int | None]) -> Any:
        losses = yield from self._compare(candidates, parts)
        return min(losses, key=losses.__getitem__)

    def _compare(self, candidates: list[Candidate], parts: Sequence[int | None]) -> Any:
        """The sum of each one's losses, in order; infinity where there is none."""
        candidates = distinct(candidates)
        outcomes = yield [Trial(candidate, part) for candidate in candidates for part in parts]
        losses, size = [outcome.loss for outcome in outcomes], len(parts)
        whole = max(1, len(losses) // size)  # a budget that ends here cuts some off
        sums = [sum(losses[i * size : (i + 1) * size]) for i in range(whole)]
        # Rounded, so that the last bits of a sum decide nothing; the earlier one wins a tie.
        ranks = [round(total, 6) if math.isfinite(total) else math.inf for total in sums]
        return dict(zip(candidates, ranks, strict=False))

    @property
    def _alone(self) -> bool:
        """Whether there is one window: a step on it is one on all."""
        return self.price.parts == 1

    @property
    def _some(self) -> tuple[int | None, ...]:
        """The windows that starts are compared on; with ramps half of them, of few all."""
        parts = self.price.parts
        count = max(1, _COMPARED * parts // len(self.starts))
        if self.problem.ramp:
            count = max(_FEW, parts // 2)
        return tuple(range(count)) if count < parts else (None,)

    @property
    def _spent(self) -> float:
        return sum(self.price.of(trial) for trial in self._told)

    def _affordable(self, start_tokens: int) -> int:
        """Steps that the budget leaves beside what is spent, and the evaluations after them."""
        one = 1 / self.price.parts
        around = 1.0 if self._alone else 2.0  # the last point; and of several windows the mean
        if start_tokens:
            around += (start_tokens + 1) * one + 1
        step = self.price.slope * one * min(self.settings.windows_per_step, self.price.parts)
        left = self.settings.budget - self._spent - around
        return max(0, math.floor(left / step + _ROUNDING))

    def _part(self) -> int | None:
        """The next window of a shuffled round; None where there is one."""
        if self._alone:
            return None
        if not self._order:
            self._order = list(range(self.price.parts))
            self._rng.shuffle(self._order)
        return self._order.pop()

    def _move(self, outcomes: Sequence[Outcome]) -> None:
        """One step of Adam with a falling rate, and back into the space."""
        self._step += 1
        slope = np.mean([outcome.slope for outcome in outcomes], axis=0)
        if not np.isfinite(slope).all():
            slope = np.zeros_like(self._point)
        slope = np.clip(slope, -_CLIP, _CLIP)
        slope[: self._fixed] = 0
        slope[self._fixed :] = _blurred(slope[self._fixed :])
        self._mean = _BETA1 * self._mean + (1 - _BETA1) * slope
        self._square = _BETA2 * self._square + (1 - _BETA2) * slope**2
        mean = self._mean / (1 - _BETA1**self._step)
        size = np.sqrt(self._square / (1 - _BETA2**self._step))
        rate = self.settings.step_size * (_SURE if self._alone else 1)
        rate *= min(1.0, 2 * (1 - self._step / (self._steps + 1)))
        self._point = self._monotone(self._point - rate * mean / (size + _SMALL))
        if self._step > (1 - _TAIL) * self._steps:
            self._last.append(self._point)

    def _monotone(self, point: np.ndarray) -> np.ndarray:
        """The nearest point of the space with the fixed dimensions where they are."""
        fixed = self._point[: self._fixed]
        low = fixed[-1] if len(fixed) else 0.0
        rest = np.clip(isotonic(point[self._fixed :]), low, math.log(self.space.top / 100))
        return np.concatenate([fixed, rest])

    def _here(self, begin: Candidate) -> Candidate:
        return self._candidate(self._point, begin)

    def _candidate(self, point: np.ndarray, begin: Candidate) -> Candidate:
        return self.space.rounded(np.exp(point), begin.start_tokens)


def _blurred(values: np.ndarray) -> np.ndarray:
    """A share of each number goes to its neighbours; at the ends it stays."""
    wide = np.pad(values, 1, mode="edge")
    return (1 - 2 * _SHARED) * values + _SHARED * (wide[:-2] + wide[2:])


def isotonic(values: np.ndarray) -> np.ndarray:
    """The nearest never-decreasing sequence in the sum of squares (pool adjacent violators)."""
    means: list[float] = []
    counts: list[int] = []
    for value in values:
        means.append(float(value))
        counts.append(1)
        while len(means) > 1 and means[-2] > means[-1]:
            mean, count = means.pop(), counts.pop()
            means[-1] = (means[-1] * counts[-1] + mean * count) / (counts[-1] + count)
            counts[-1] += count
    return np.repeat(means, counts)
