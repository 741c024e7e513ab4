import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_evolution import starts
from test_space import space

from longrope.search.descent import Descent, DescentSettings, isotonic
from longrope.search.space import Outcome, Price, Space

HERE = space()
PRICE = Price(parts=5, slope=2.66)
BEST = np.linspace(0, math.log(7), HERE.dimensions)


def bowl(trial, best=BEST):
    """Least at a monotone point, a little elsewhere for each window; n̂ = 8 gains a little."""
    shift = 0.0 if trial.part is None else 0.05 * (trial.part - 2)
    away = np.log(HERE.multipliers(trial.candidate)) - best - shift
    loss = float((away**2).sum()) + 0.01 * abs(trial.candidate.start_tokens - 8)
    return Outcome(loss, tuple((2 * away).tolist()) if trial.slope else ())


def run(seed=0, here=HERE, price=PRICE, of=bowl, begin=None, **settings):
    begin = begin or starts(here)
    algorithm = Descent(here, begin, DescentSettings(**settings), seed, price)
    asked, outcomes = [], []
    while not algorithm.done:
        trials = algorithm.ask()
        assert all(here.contains(trial.candidate) for trial in trials)
        found = [of(trial) for trial in trials]
        algorithm.tell(trials, found)
        asked += trials
        outcomes += found
    return asked, outcomes


def test_steps_down_and_tries_start_tokens():
    asked, outcomes = run(forwards=40)
    whole = {t: o.loss for t, o in zip(asked, outcomes, strict=True) if t.part is None}
    first, best = next(iter(whole)), min(whole, key=lambda trial: whole[trial])
    assert whole[best] < 0.3 * whole[first]
    assert best.candidate.start_tokens == 8
    assert {t.part for t in asked if t.slope} == set(range(5))


@pytest.mark.parametrize("forwards", [4, 5, 8, 27, 100])
@pytest.mark.parametrize("price", [PRICE, Price(parts=1, slope=5.5)])
def test_keeps_its_budget(forwards, price):
    asked, _ = run(forwards=forwards, price=price)
    spent = sum(price.of(trial) for trial in dict.fromkeys(asked))
    assert spent <= forwards
    if forwards >= 27:
        assert spent > forwards - 2 * price.slope - 1


def test_a_budget_without_a_step_is_said(caplog):
    asked, _ = run(forwards=5)
    assert not any(trial.slope for trial in asked)
    assert "a budget of 5 forwards leaves none for a step" in caplog.text
    caplog.clear()
    run(forwards=27)
    assert not caplog.text


@pytest.mark.parametrize(("forwards", "steps"), [(27, 6), (54, 14)])
def test_one_window_leaves_its_budget_to_the_steps(forwards, steps):
    asked, _ = run(forwards=forwards, price=Price(parts=1, slope=3.5))
    slopes = [number for number, trial in enumerate(asked) if trial.slope]
    assert len(slopes) == steps
    assert all(trial.candidate.portable for trial in asked)
    assert len(asked[slopes[-1] + 1 :]) == 1  # every slope told the whole loss but the last point's


def test_the_first_step_of_one_window_is_twice_as_long():
    def first_step(price):
        asked = [trial for trial in run(price=price)[0] if trial.slope]
        begin, then = (np.log(HERE.multipliers(trial.candidate)) for trial in asked[:2])
        return np.abs(then - begin).max()

    one, five = first_step(Price(parts=1, slope=2.66)), first_step(PRICE)
    assert one == pytest.approx(2 * five, rel=0.2)


def test_a_step_may_look_at_several_windows():
    one, three = run()[0], run(step_windows=3)[0]
    slopes = [trial for trial in three if trial.slope]
    assert [trial.candidate for trial in slopes[0:3]] == [slopes[0].candidate] * 3
    assert len({trial.part for trial in slopes[0:3]}) > 1
    assert sum(map(PRICE.of, three)) == pytest.approx(sum(map(PRICE.of, one)), abs=2)


def test_fast_dimensions_stay():
    turns = 256 * HERE.start.inv_freq / (2 * np.pi)
    yarn = starts(HERE)[2:]
    asked, _ = run(begin=yarn, of=lambda trial: bowl(trial, np.full(HERE.dimensions, 2.0)))
    steps = [trial.candidate.hundredths for trial in asked if trial.slope]
    fixed = int((turns > 16).sum())
    assert fixed > 0
    assert len({step[:fixed] for step in steps}) == 1
    assert len({step[fixed:] for step in steps}) > 10


def test_a_seed_is_a_course():
    assert run(3) == run(3)
    assert run(3) != run(4)


def test_what_is_not_finite_moves_nothing():
    def broken(trial):
        return Outcome(math.nan, (math.nan,) * HERE.dimensions if trial.slope else ())

    asked, _ = run(of=broken)
    assert len({trial.candidate.hundredths for trial in asked if trial.slope}) == 1


def test_fixed_start_tokens_stay():
    fixed = Space(HERE.start, HERE.upper, (0,))
    assert all(trial.candidate.start_tokens == 0 for trial in run(here=fixed)[0])


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


@pytest.mark.parametrize("wrong", [{"forwards": 3}, {"rate": 0.0}, {"step_windows": 0}])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match="must be"):
        DescentSettings(**wrong)
