import contextlib
import functools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope.search.cost import EvaluationCost
from longrope.search.gradient_search import _smoothed, gradient_search, isotonic, make_schedule
from longrope.search.problem import Problem
from longrope.search.ramps import walk_ramps
from longrope.search.settings import GradientSearchConfig
from longrope.search.space import Result, Space
from search.test_evolution import problem
from search.test_space import space

HERE = space()
COST = EvaluationCost(windows=5, grad=2.66)
BEST = np.linspace(0, math.log(7), HERE.dimensions)


def bowl(request, best=BEST):
    """Least at a monotone point, a little elsewhere for each window; n̂ = 8 gains a little."""
    shift = 0.0 if request.window is None else 0.05 * (request.window - 2)
    away = np.log(HERE.multipliers(request.candidate)) - best - shift
    loss = float((away**2).sum()) + 0.01 * abs(request.candidate.start_tokens - 8)
    return Result(loss, tuple((2 * away).tolist()) if request.grad else ())


def run(seed=0, cost=COST, of=bowl, begin=None, starts=None, **options):
    begin, asked, results = begin or problem(HERE), [], []

    def evaluate(requests, named=None):
        assert all(begin.space.contains(request.candidate) for request in requests)
        if starts is not None:
            starts.update(named or {})
        found = [of(request) for request in requests]
        asked.extend(requests)
        results.extend(found)
        return found

    gradient_search(evaluate, begin, GradientSearchConfig(**options), seed, cost)
    return asked, results


def test_steps_down_and_tries_start_tokens():
    asked, results = run(budget=40)
    whole = {t: o.loss for t, o in zip(asked, results, strict=True) if t.window is None}
    first, best = next(iter(whole)), min(whole, key=lambda request: whole[request])
    assert whole[best] < 0.3 * whole[first]
    assert best.candidate.start_tokens == 8
    assert {t.window for t in asked if t.grad} == set(range(5))


@pytest.mark.parametrize("forwards", [4, 5, 8, 27, 100])
@pytest.mark.parametrize("cost", [COST, EvaluationCost(windows=1, grad=5.5)])
def test_keeps_its_budget(forwards, cost):
    asked, _ = run(budget=forwards, cost=cost)
    spent = sum(cost.of(request) for request in dict.fromkeys(asked))
    assert spent <= forwards
    if forwards >= 27:
        assert spent > forwards - 2 * cost.grad - 1


def test_a_budget_without_a_step_is_said(caplog):
    asked, _ = run(budget=5)
    assert not any(request.grad for request in asked)
    (record,) = caplog.records
    given, enough = record.args
    assert given == 5
    caplog.clear()
    for budget in (enough - 1, enough):
        asked, _ = run(budget=budget)
        assert any(request.grad for request in asked) == (budget == enough)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("forwards", "steps"), [(27, 6), (54, 14)])
def test_one_window_leaves_its_budget_to_the_steps(forwards, steps):
    asked, _ = run(budget=forwards, cost=EvaluationCost(windows=1, grad=3.5))
    gradients = [number for number, request in enumerate(asked) if request.grad]
    assert len(gradients) == steps
    assert all(request.candidate.portable for request in asked)
    assert len(asked[gradients[-1] + 1 :]) == 1  # only the last point's loss is not known


def test_two_windows_are_both_asked_of_every_start_and_leave_start_tokens():
    family, of = ramps(lambda fast, slow: -math.log(fast))
    asked, _ = run(begin=family, cost=EvaluationCost(windows=2, grad=3.5), of=of)
    first = next(number for number, request in enumerate(asked) if request.grad)
    assert first > 4
    assert all(request.window is None for request in asked[:first])
    assert {request.window for request in asked if request.grad} == {0, 1}
    assert all(request.candidate.portable for request in asked)


def test_the_first_step_of_one_window_is_three_times_as_long():
    def first_step(cost):
        asked = [request for request in run(cost=cost)[0] if request.grad]
        begin, then = (np.log(HERE.multipliers(request.candidate)) for request in asked[:2])
        return np.abs(then - begin).max()

    one, five = first_step(EvaluationCost(windows=1, grad=2.66)), first_step(COST)
    assert one == pytest.approx(3 * five, rel=0.2)


def test_a_step_may_look_at_several_windows():
    one, three = run()[0], run(windows_per_step=3)[0]
    gradients = [request for request in three if request.grad]
    assert [request.candidate for request in gradients[0:3]] == [gradients[0].candidate] * 3
    assert len({request.window for request in gradients[0:3]}) > 1
    assert sum(map(COST.of, three)) == pytest.approx(sum(map(COST.of, one)), abs=2)


def test_fast_dimensions_stay():
    turns = 256 * HERE.start.inv_freq / (2 * np.pi)
    yarn = Problem(HERE, {"yarn": problem(HERE).starts["yarn"]})
    asked, _ = run(begin=yarn, of=lambda request: bowl(request, np.full(HERE.dimensions, 2.0)))
    steps = [request.candidate.hundredths for request in asked if request.grad]
    fixed = int((turns > 16).sum())
    assert fixed > 0
    assert len({step[:fixed] for step in steps}) == 1
    assert len({step[fixed:] for step in steps}) > 10


def ramps(loss):
    """A problem with a family of ramps; their losses on every window, YaRN's is 9."""
    losses = {}

    @functools.cache
    def ramp(*turns):
        candidate = HERE.rounded(np.full(HERE.dimensions, 1 + len(losses) / 10), 0)
        losses[candidate] = loss(*turns)
        return candidate

    def of(request):
        grad = tuple(np.zeros(HERE.dimensions)) if request.grad else ()
        return Result(losses.get(request.candidate, 9.0), grad)

    return Problem(HERE, problem(HERE).starts, ramp), of


@pytest.mark.parametrize("cost", [COST, EvaluationCost(windows=1, grad=3.5)])
def test_begins_from_the_best_ramp(cost):
    family, of = ramps(lambda fast, slow: abs(math.log2(fast / 256)) + abs(math.log2(slow)))
    starts = {}
    asked, _ = run(begin=family, cost=cost, of=of, starts=starts, budget=27)
    assert list(starts)[:6] == ["ntk", "yarn", *(f"ramp {n}-1" for n in (32, 128, 512, 256))]
    first = next(request for request in asked if request.grad)
    assert first.candidate == starts["ramp 256-1"]
    assert family.starts["pi"] not in starts.values()


@pytest.mark.parametrize("cost", [COST, EvaluationCost(windows=1, grad=3.5)])
@pytest.mark.parametrize("forwards", [4, 7, 27])
def test_ramps_have_a_share_of_the_budget(cost, forwards):
    family, of = ramps(lambda fast, slow: -math.log(fast))  # always on
    asked, _ = run(begin=family, cost=cost, of=of, budget=forwards)
    several = cost.windows > 1
    ended = (n for n, t in enumerate(asked) if t.grad or (several and t.window is None))
    spent = sum(cost.of(request) for request in {*asked[: next(ended, None)]})
    share, one = max(3, 0.3 * forwards), 2 / cost.windows if several else 1
    assert share - one < spent <= share + 1e-9
    assert sum(cost.of(request) for request in dict.fromkeys(asked)) <= forwards


@given(st.floats(0, 13), st.floats(-6, 4))
def test_a_walk_ends_beside_the_least(fast, slow):
    """Of a bowl: within a step of either number, unless the two meet."""
    steps, least, best = walk_ramps(), math.inf, None
    tried = []
    with contextlib.suppress(StopIteration):
        turns = next(steps)
        while True:
            tried.append(turns)
            loss = abs(math.log2(turns[0]) - fast) + abs(math.log2(turns[1]) - slow)
            if loss < least:
                least, best = loss, turns
            turns = steps.send(loss)
    assert best is not None
    assert all(a > b for a, b in tried)
    assert abs(math.log2(best[0]) - fast) <= 1 or best[0] == 2 * best[1]
    assert abs(math.log2(best[1]) - slow) <= 0.5 or best[0] == 2 * best[1]
    assert len(tried) <= 9 + abs(fast - 5) / 2 + abs(slow)


def test_a_walk_does_not_stay_where_there_is_no_loss():
    steps = walk_ramps()
    assert next(steps) == (32, 1)
    assert steps.send(math.inf) == (128, 1)
    assert steps.send(math.inf) == (8, 1)
    assert steps.send(1.0) == (2, 1)


def test_a_seed_is_a_course():
    assert run(3) == run(3)
    assert run(3) != run(4)


def test_what_is_not_finite_moves_nothing():
    def broken(request):
        return Result(math.nan, (math.nan,) * HERE.dimensions if request.grad else ())

    asked, _ = run(of=broken)
    assert len({request.candidate.hundredths for request in asked if request.grad}) == 1


def test_fixed_start_tokens_stay():
    fixed = problem(Space(HERE.start, HERE.max_factor, (0,)))
    assert all(request.candidate.start_tokens == 0 for request in run(begin=fixed)[0])


@pytest.mark.parametrize("windows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("forwards", range(4, 11))
def test_five_starts_leave_an_evaluation_of_the_best(windows, forwards):
    five = {str(n): HERE.rounded(np.full(HERE.dimensions, 1 + n / 10), 0) for n in range(5)}
    asked, _ = run(begin=Problem(HERE, five), cost=EvaluationCost(windows, 2.7), budget=forwards)
    spent = np.cumsum(
        [EvaluationCost(windows, 2.7).of(request) for request in dict.fromkeys(asked)]
    )
    paid = [t for t, sum_ in zip(dict.fromkeys(asked), spent, strict=True) if sum_ <= forwards]
    assert any(request.window is None for request in paid)


def test_gradients_are_shared_with_neighbours():
    np.testing.assert_allclose(_smoothed(np.array([0, 0, 1.0, 0])), [0, 0.1, 0.8, 0.1])
    np.testing.assert_allclose(_smoothed(np.array([1.0, 0, 0])), [0.9, 0.1, 0])
    np.testing.assert_allclose(_smoothed(np.array([2.0])), [2.0])


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12))
def test_isotonic_is_the_nearest_monotone_sequence(values):
    values = np.array(values)
    found = isotonic(values)
    assert (np.diff(found) >= -1e-12).all()
    # The conditions of the projection on a cone: orthogonal to itself, no better direction.
    rest = values - found
    assert rest @ found == pytest.approx(0, abs=1e-9)
    for cut in range(len(values) + 1):
        direction = (np.arange(len(values)) >= cut).astype(float)
        assert rest @ direction <= 1e-9
        if cut == 0:
            assert rest @ direction == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("windows", "budget", "steps", "averaged", "tokens"),
    [
        (1, 27, 6, 0, ()),
        (2, 27, 12, 4, ()),
        (5, 4, 0, 0, (4, 8, 16, 32)),
        (5, 27, 28, 9, (4, 8, 16, 32)),
    ],
)
def test_the_schedule_follows_from_windows_and_budget(windows, budget, steps, averaged, tokens):
    config = GradientSearchConfig(windows=windows, budget=budget)
    found = make_schedule(problem(HERE), config, EvaluationCost(windows, 3.5))
    assert (found.steps, found.averaged_steps, found.start_tokens) == (steps, averaged, tokens)
    assert found.step_size == pytest.approx(0.18 if windows == 1 else 0.06)


def test_ramps_that_are_not_tried_leave_more_steps():
    family, of = ramps(lambda fast, slow: abs(math.log2(fast / 32)) + abs(math.log2(slow)))
    planned = make_schedule(family, GradientSearchConfig(), COST)
    asked, _ = run(begin=family, of=of)
    assert planned.ramp_trials > 9
    assert sum(request.grad for request in asked) > planned.steps
