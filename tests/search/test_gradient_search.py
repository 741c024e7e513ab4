import contextlib
import functools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope.search.gradient_search import GradientSearch, _blurred, isotonic
from longrope.search.problem import Problem
from longrope.search.ramps import walk
from longrope.search.settings import GradientSearchConfig
from longrope.search.space import Outcome, Price, Space
from search.test_evolution import problem
from search.test_space import space

HERE = space()
PRICE = Price(parts=5, slope=2.66)
BEST = np.linspace(0, math.log(7), HERE.dimensions)


def bowl(trial, best=BEST):
    """Least at a monotone point, a little elsewhere for each window; n̂ = 8 gains a little."""
    shift = 0.0 if trial.part is None else 0.05 * (trial.part - 2)
    away = np.log(HERE.multipliers(trial.candidate)) - best - shift
    loss = float((away**2).sum()) + 0.01 * abs(trial.candidate.start_tokens - 8)
    return Outcome(loss, tuple((2 * away).tolist()) if trial.slope else ())


def run(seed=0, price=PRICE, of=bowl, begin=None, **settings):
    algorithm = GradientSearch(
        begin or problem(HERE), GradientSearchConfig(**settings), seed, price
    )
    asked, outcomes = [], []
    while not algorithm.done:
        trials = algorithm.ask()
        assert all(algorithm.space.contains(trial.candidate) for trial in trials)
        found = [of(trial) for trial in trials]
        algorithm.tell(trials, found)
        asked += trials
        outcomes += found
    return asked, outcomes


def test_steps_down_and_tries_start_tokens():
    asked, outcomes = run(budget=40)
    whole = {t: o.loss for t, o in zip(asked, outcomes, strict=True) if t.part is None}
    first, best = next(iter(whole)), min(whole, key=lambda trial: whole[trial])
    assert whole[best] < 0.3 * whole[first]
    assert best.candidate.start_tokens == 8
    assert {t.part for t in asked if t.slope} == set(range(5))


@pytest.mark.parametrize("forwards", [4, 5, 8, 27, 100])
@pytest.mark.parametrize("price", [PRICE, Price(parts=1, slope=5.5)])
def test_keeps_its_budget(forwards, price):
    asked, _ = run(budget=forwards, price=price)
    spent = sum(price.of(trial) for trial in dict.fromkeys(asked))
    assert spent <= forwards
    if forwards >= 27:
        assert spent > forwards - 2 * price.slope - 1


def test_a_budget_without_a_step_is_said(caplog):
    asked, _ = run(budget=5)
    assert not any(trial.slope for trial in asked)
    assert "a budget of 5 forwards leaves none for a step" in caplog.text
    caplog.clear()
    run(budget=27)
    assert not caplog.text


@pytest.mark.parametrize(("forwards", "steps"), [(27, 6), (54, 14)])
def test_one_window_leaves_its_budget_to_the_steps(forwards, steps):
    asked, _ = run(budget=forwards, price=Price(parts=1, slope=3.5))
    slopes = [number for number, trial in enumerate(asked) if trial.slope]
    assert len(slopes) == steps
    assert all(trial.candidate.portable for trial in asked)
    assert len(asked[slopes[-1] + 1 :]) == 1  # every slope told the whole loss but the last point's


def test_two_windows_are_both_asked_of_every_start_and_leave_start_tokens():
    family, of = ramps(lambda fast, slow: -math.log(fast))
    asked, _ = run(begin=family, price=Price(parts=2, slope=3.5), of=of)
    first = next(number for number, trial in enumerate(asked) if trial.slope)
    assert first > 4
    assert all(trial.part is None for trial in asked[:first])
    assert {trial.part for trial in asked if trial.slope} == {0, 1}
    assert all(trial.candidate.portable for trial in asked)


def test_the_first_step_of_one_window_is_three_times_as_long():
    def first_step(price):
        asked = [trial for trial in run(price=price)[0] if trial.slope]
        begin, then = (np.log(HERE.multipliers(trial.candidate)) for trial in asked[:2])
        return np.abs(then - begin).max()

    one, five = first_step(Price(parts=1, slope=2.66)), first_step(PRICE)
    assert one == pytest.approx(3 * five, rel=0.2)


def test_a_step_may_look_at_several_windows():
    one, three = run()[0], run(windows_per_step=3)[0]
    slopes = [trial for trial in three if trial.slope]
    assert [trial.candidate for trial in slopes[0:3]] == [slopes[0].candidate] * 3
    assert len({trial.part for trial in slopes[0:3]}) > 1
    assert sum(map(PRICE.of, three)) == pytest.approx(sum(map(PRICE.of, one)), abs=2)


def test_fast_dimensions_stay():
    turns = 256 * HERE.start.inv_freq / (2 * np.pi)
    yarn = Problem(HERE, {"yarn": problem(HERE).starts["yarn"]})
    asked, _ = run(begin=yarn, of=lambda trial: bowl(trial, np.full(HERE.dimensions, 2.0)))
    steps = [trial.candidate.hundredths for trial in asked if trial.slope]
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

    def of(trial):
        slope = tuple(np.zeros(HERE.dimensions)) if trial.slope else ()
        return Outcome(losses.get(trial.candidate, 9.0), slope)

    return Problem(HERE, problem(HERE).starts, ramp), of


@pytest.mark.parametrize("price", [PRICE, Price(parts=1, slope=3.5)])
def test_begins_from_the_best_ramp(price):
    family, of = ramps(lambda fast, slow: abs(math.log2(fast / 256)) + abs(math.log2(slow)))
    algorithm = GradientSearch(family, GradientSearchConfig(), 0, price)
    while not (algorithm.done or any(trial.slope for trial in algorithm.ask())):
        algorithm.tell(algorithm.ask(), [of(trial) for trial in algorithm.ask()])
    assert list(algorithm.starts)[:5] == ["yarn", *(f"ramp {n}-1" for n in (32, 128, 512, 256))]
    (trial,) = algorithm.ask()
    assert trial.candidate == algorithm.starts["ramp 256-1"]
    assert {*family.starts.values()} & {*algorithm.starts.values()} == {family.starts["yarn"]}


@pytest.mark.parametrize("price", [PRICE, Price(parts=1, slope=3.5)])
@pytest.mark.parametrize("forwards", [4, 7, 27])
def test_ramps_have_a_share_of_the_budget(price, forwards):
    family, of = ramps(lambda fast, slow: -math.log(fast))  # always on
    asked, _ = run(begin=family, price=price, of=of, budget=forwards)
    several = price.parts > 1
    ended = (n for n, t in enumerate(asked) if t.slope or (several and t.part is None))
    spent = sum(price.of(trial) for trial in {*asked[: next(ended, None)]})
    share, one = max(3, 0.3 * forwards), 2 / price.parts if several else 1
    assert share - one < spent <= share + 1e-9
    assert sum(price.of(trial) for trial in dict.fromkeys(asked)) <= forwards


@given(st.floats(0, 13), st.floats(-6, 4))
def test_a_walk_ends_beside_the_least(fast, slow):
    """Of a bowl: within a step of either number, unless the two meet."""
    steps, least, best = walk(), math.inf, None
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
    steps = walk()
    assert next(steps) == (32, 1)
    assert steps.send(math.inf) == (128, 1)
    assert steps.send(math.inf) == (8, 1)
    assert steps.send(1.0) == (2, 1)


def test_a_seed_is_a_course():
    assert run(3) == run(3)
    assert run(3) != run(4)


def test_what_is_not_finite_moves_nothing():
    def broken(trial):
        return Outcome(math.nan, (math.nan,) * HERE.dimensions if trial.slope else ())

    asked, _ = run(of=broken)
    assert len({trial.candidate.hundredths for trial in asked if trial.slope}) == 1


def test_fixed_start_tokens_stay():
    fixed = problem(Space(HERE.start, HERE.max_factor, (0,)))
    assert all(trial.candidate.start_tokens == 0 for trial in run(begin=fixed)[0])


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("forwards", range(4, 11))
def test_five_starts_leave_an_evaluation_of_the_best(parts, forwards):
    five = {str(n): HERE.rounded(np.full(HERE.dimensions, 1 + n / 10), 0) for n in range(5)}
    asked, _ = run(begin=Problem(HERE, five), price=Price(parts, 2.7), budget=forwards)
    spent = np.cumsum([Price(parts, 2.7).of(trial) for trial in dict.fromkeys(asked)])
    paid = [t for t, sum_ in zip(dict.fromkeys(asked), spent, strict=True) if sum_ <= forwards]
    assert any(trial.part is None for trial in paid)


def test_a_slope_shares_with_its_neighbours():
    np.testing.assert_allclose(_blurred(np.array([0, 0, 1.0, 0])), [0, 0.1, 0.8, 0.1])
    np.testing.assert_allclose(_blurred(np.array([1.0, 0, 0])), [0.9, 0.1, 0])
    np.testing.assert_allclose(_blurred(np.array([2.0])), [2.0])


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
