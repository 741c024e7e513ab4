"""The gradient search: descent on the loss under the monotone constraint.

One backward pass gives the gradient with respect to all factors for the cost of about three
forward passes. Algorithm 1 learns one number from each forward pass. Each step uses the gradient on
one search window, in turn, so it costs a fraction of an evaluation on all windows.
"""

import dataclasses
import itertools
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from longrope.search.cost import EvaluationCost
from longrope.search.problem import Problem
from longrope.search.ramps import walk_ramps
from longrope.search.settings import LEAST_BUDGET, GradientSearchConfig
from longrope.search.space import (
    Candidate,
    Evaluate,
    Request,
    Result,
    Space,
    distinct,
)

log = logging.getLogger(__name__)

# Adam's averages have a short memory: a search has about thirty steps.
_BETA1, _BETA2 = 0.8, 0.95
# Gradients smaller than this, in nats per unit of ln λ, take less than a full step.
_SMALL = 3e-3
# Gradients are clipped here: Adam's average of squares would remember larger ones too long.
_CLIP = 0.5
# Step size multiplier with one window: its gradients have no sampling noise, and steps are few.
_SURE = 3
# Gradient smoothing: fraction shared with each neighbouring dimension.
_SHARED = 0.1
# Dimensions with more rotations within the original length keep their first factors: their
# gradients are large, with a sign that changes from window to window.
_ROTATIONS = 16
# Fraction of the budget for starts and ramps; forward passes for comparing other starts.
_BEGINNING = 0.3
_COMPARED = 2
# Of the comparisons at the beginning, one in so many is a start of the problem, the others ramps.
_STARTS = 3
# The mean over this last fraction of the steps is a finalist beside the last point.
_TAIL = 0.3
# With at most this many windows, ramps are compared on all, and no start tokens are tried.
_FEW = 2
# Tolerance for sums of costs.
_ROUNDING = 1e-9
# Start tokens to try on the result, where the space has them.
_START_TOKENS = (4, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Schedule of a gradient search: how it spends its budget.

    Attributes:
        starts: number of the problem's starts to compare.
        compared: windows on which starts are compared; None for all windows at once.
        ramp_trials: largest number of ramps to compare with them.
        steps: number of gradient steps.
        step_size: largest step in ln λ.
        averaged_steps: number of last steps whose mean is a finalist too; 0 for none.
        start_tokens: numbers of start tokens to try on the result.
    """

    starts: int
    compared: tuple[int | None, ...]
    ramp_trials: int
    steps: int
    step_size: float
    averaged_steps: int
    start_tokens: tuple[int, ...]

    def __str__(self) -> str:
        where = "all windows" if self.compared == (None,) else f"{len(self.compared)} windows"
        tokens = ", ".join(map(str, self.start_tokens)) or "none"
        return (
            f"schedule: {self.starts} starts and at most {self.ramp_trials} ramps, compared on "
            f"{where}; "
            f"{self.steps} steps of at most {self.step_size:g} in ln λ, the last "
            f"{self.averaged_steps} averaged; start tokens to try: {tokens}"
        )


def make_schedule(
    problem: Problem, config: GradientSearchConfig, cost: EvaluationCost, spent: float | None = None
) -> Schedule:
    """Return the schedule of a gradient search for a number of windows and a budget.

    Args:
        spent: forward passes that the comparison of starts took; by default what it takes with
            all ramp trials. The walk over ramps may end earlier, which leaves more steps.
    """
    windows, space = cost.windows, problem.space
    starts = len({*problem.compared.values()})
    count = max(_FEW, windows // 2) if problem.ramp else max(1, _COMPARED * windows // starts)
    compared = tuple(range(count)) if count < windows else (None,)
    one = 1.0 if compared == (None,) else count / windows
    ramp_trials = 0
    if problem.ramp:
        share = max(LEAST_BUDGET - 1, _BEGINNING * config.budget)
        comparisons = math.floor((share + _ROUNDING) / one)
        starts = min(starts, max(_FEW, comparisons // _STARTS))
        ramp_trials = max(0, comparisons - starts)
    if spent is None:
        spent = (starts + ramp_trials) * one + (compared != (None,))
    portable = all(candidate.portable for candidate in problem.starts.values())
    tokens = tuple(n for n in _START_TOKENS if n in space.start_tokens)
    tokens = tokens if portable and windows > _FEW else ()
    # The last point, and with several windows the mean; then start tokens on one window.
    reserved = 1.0 if windows == 1 else 2.0
    if tokens:
        reserved += (len(tokens) + 1) / windows + 1
    step = cost.grad / windows * min(config.windows_per_step, windows)
    steps = max(0, math.floor((config.budget - spent - reserved) / step + _ROUNDING))
    if _fixed_dimensions(space) == space.dimensions:
        steps = 0  # Gemma 4: every dimension has many rotations
    # With one window a gradient has no noise to average.
    averaged = sum(step > (1 - _TAIL) * steps for step in range(1, steps + 1))
    return Schedule(
        starts=starts,
        compared=compared,
        ramp_trials=ramp_trials,
        steps=steps,
        step_size=config.step_size * (_SURE if windows == 1 else 1),
        averaged_steps=0 if windows == 1 else averaged,
        start_tokens=tokens,
    )


def _least_budget(problem: Problem, config: GradientSearchConfig, cost: EvaluationCost) -> int:
    """Return the smallest budget above the given one that leaves a gradient search a step."""
    budgets = itertools.count(math.floor(config.budget) + 1)
    return next(
        budget
        for budget in budgets
        if make_schedule(problem, config.model_copy(update={"budget": budget}), cost).steps
    )


def gradient_search(
    evaluate: Evaluate,
    problem: Problem,
    config: GradientSearchConfig,
    seed: int,
    cost: EvaluationCost,
    show: Callable[[Schedule], None] = lambda schedule: None,
) -> None:
    """Run the gradient search: compare the starts, then take Adam steps in ln λ from the best.

    The starts are those of the problem, and ramps where it has them. Each step
    is projected to the nearest monotone factors. The last point and the mean of the last steps are
    evaluated on all windows, then start tokens are tried on the better one. The same seed and
    results give the same requests.

    Args:
        evaluate: returns the results of requests, or raises to end the search.
        cost: of the requests; the schedule follows from it.
        show: called with the schedule, and again if the ramps leave a budget for more steps.
    """
    spent: dict[Request, float] = {}  # in order, so that the sum is the same in every process

    def counted(
        requests: Sequence[Request], starts: dict[str, Candidate] | None = None
    ) -> list[Result]:
        results = evaluate(requests, starts)
        spent.update({request: cost.of(request) for request in requests})
        return results

    space, planned = problem.space, make_schedule(problem, config, cost)
    show(planned)
    begin = _best_start(counted, problem, planned)
    counted([Request(begin)])
    schedule = make_schedule(problem, config, cost, sum(spent.values()))
    if schedule != planned:
        show(schedule)
    if not schedule.steps:
        if _fixed_dimensions(space) < space.dimensions:
            log.warning(
                "a `budget` of %s forward passes leaves no gradient step after the comparison of "
                "the starts, so the best start is the result; from %s on there are steps",
                config.budget,
                _least_budget(problem, config, cost),
            )
        return
    windows = _window_order(cost.windows, random.Random(seed))
    points = _descend(counted, space, config, schedule, begin, windows)
    finalists = [space.rounded(np.exp(points[-1]), begin.start_tokens)]
    if schedule.averaged_steps:
        mean = np.mean(points[-schedule.averaged_steps :], axis=0)
        mean = _projected(mean, points[-1], space)
        finalists.append(space.rounded(np.exp(mean), begin.start_tokens))
    found = _least(_losses(counted, finalists, (None,)))
    if schedule.start_tokens:
        tokens = (0, *schedule.start_tokens)
        others = [dataclasses.replace(found, start_tokens=n) for n in tokens]
        best = _least(_losses(counted, others, (0,)))
        if best != found:
            counted([Request(best)])


def _best_start(evaluate: Evaluate, problem: Problem, schedule: Schedule) -> Candidate:
    starts = problem.compared
    if problem.ramp:
        starts = dict(list(starts.items())[: schedule.starts])
    losses = _losses(evaluate, list(starts.values()), schedule.compared, starts)
    ramps, loss = walk_ramps(), None
    for _ in range(schedule.ramp_trials):
        assert problem.ramp is not None
        try:
            rotations = next(ramps) if loss is None else ramps.send(loss)
        except StopIteration:
            break
        ramp = problem.ramp(*rotations)
        named = {"ramp {:g}-{:g}".format(*rotations): ramp}
        losses |= _losses(evaluate, [ramp], schedule.compared, named)
        loss = losses[ramp]
    return _least(losses)


def _losses(
    evaluate: Evaluate,
    candidates: list[Candidate],
    windows: Sequence[int | None],
    starts: dict[str, Candidate] | None = None,
) -> dict[Candidate, float]:
    """Sum each start's or finalist's losses in a gradient search; infinity if one is not finite."""
    candidates, size = distinct(candidates), len(windows)
    requests = [Request(candidate, window) for candidate in candidates for window in windows]
    losses = [result.loss for result in evaluate(requests, starts)]
    sums = [sum(losses[i * size : (i + 1) * size]) for i in range(len(candidates))]
    # Rounded, so that the last bits of a sum decide nothing; the earlier candidate wins a tie.
    ranks = [round(total, 6) if math.isfinite(total) else math.inf for total in sums]
    return dict(zip(candidates, ranks, strict=True))


def _least(losses: dict[Candidate, float]) -> Candidate:
    return min(losses, key=losses.__getitem__)


def _window_order(windows: int, rng: random.Random) -> Iterator[int | None]:
    """Yield the window of each gradient step, in endless shuffled rounds; None for a single one."""
    while True:
        order: list[int | None] = [None] if windows == 1 else list(range(windows))
        if windows > 1:
            rng.shuffle(order)
        yield from reversed(order)


def _descend(
    evaluate: Evaluate,
    space: Space,
    config: GradientSearchConfig,
    schedule: Schedule,
    begin: Candidate,
    windows: Iterator[int | None],
) -> list[np.ndarray]:
    """Return ln λ after each Adam step of the gradient search, shape (dimensions,).

    The step size falls linearly to 0 over the second half. Gradients that are not finite count as
    zero.
    """
    point, fixed = np.log(space.multipliers(begin)), _fixed_dimensions(space)
    mean, square = np.zeros_like(point), np.zeros_like(point)
    points = []
    for step in range(1, schedule.steps + 1):
        here = space.rounded(np.exp(point), begin.start_tokens)
        chosen = dict.fromkeys(next(windows) for _ in range(config.windows_per_step))
        results = evaluate([Request(here, window, grad=True) for window in chosen])
        grad = np.mean([result.grad for result in results], axis=0)
        if not np.isfinite(grad).all():
            grad = np.zeros_like(point)
        grad = np.clip(grad, -_CLIP, _CLIP)
        grad[:fixed] = 0
        grad[fixed:] = _smoothed(grad[fixed:])
        mean = _BETA1 * mean + (1 - _BETA1) * grad
        square = _BETA2 * square + (1 - _BETA2) * grad**2
        direction = mean / (1 - _BETA1**step)
        scale = np.sqrt(square / (1 - _BETA2**step))
        size = schedule.step_size * min(1.0, 2 * (1 - step / (schedule.steps + 1)))
        point = _projected(point - size * direction / (scale + _SMALL), point, space)
        points.append(point)
    return points


def _fixed_dimensions(space: Space) -> int:
    """Return the number of leading dimensions whose factors the gradient search does not change."""
    start = space.start
    rotations = start.original_max_position_embeddings * start.inv_freq / (2 * np.pi)
    return int((rotations > _ROTATIONS).sum())


def _projected(point: np.ndarray, before: np.ndarray, space: Space) -> np.ndarray:
    """Project a gradient step to the nearest point of the space; fixed dimensions do not move."""
    number = _fixed_dimensions(space)
    fixed = before[:number]
    low = fixed[-1] if len(fixed) else 0.0
    rest = np.clip(isotonic(point[number:]), low, math.log(space.top / 100))
    return np.concatenate([fixed, rest])


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Smooth a search gradient: each dimension shares a fraction with its neighbours."""
    wide = np.pad(values, 1, mode="edge")
    return (1 - 2 * _SHARED) * values + _SHARED * (wide[:-2] + wide[2:])


def isotonic(values: np.ndarray) -> np.ndarray:
    """Project the point of a gradient step to the nearest never-decreasing one (least squares)."""
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
