import dataclasses
import json
import math
import statistics

import numpy as np
import pytest

from longrope.files.lock import only_process
from longrope.rope.rescale import Rescale
from longrope.search.cost import EvaluationCost
from longrope.search.history import SearchIdentity
from longrope.search.problem import Problem, ramp
from longrope.search.run import describe_gain, run_algorithm
from longrope.search.settings import GradientSearchConfig
from longrope.search.space import Result
from search.test_evolution import SMALL, bowl, problem
from search.test_space import space

SPACE = space()


def identity(**changes) -> SearchIdentity:
    fields = {
        "model": "m",
        "documents": ("d",),
        "tokens": "w",
        "length": 2048,
        "config": SMALL,
        "seed": 0,
        "dtype": "float32",
        "device": "cpu",
        "chunk_size": 2048,
        "start": {},
        "bound": 10.0,
        "start_tokens": SPACE.start_tokens,
    }
    return SearchIdentity(**fields | changes)


class Loss:
    """A loss that counts its calls and can fail at one of them."""

    def __init__(self, fail_at: int | None = None, of=bowl):
        self.calls, self.fail_at, self.of = 0, fail_at, of

    def __call__(self, rescale, window=None, grad=False):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return Result(self.of(SPACE.nearest(rescale)))


def small(**changes):
    return SMALL.model_copy(update=changes)


def go(out, loss=None, budget=None, patience=None, **more):
    here = more.pop("identity", identity(config=small(budget=budget, patience=patience)))
    return run_algorithm(here, problem(SPACE), loss or Loss(), out, **more)


def contents(out):
    return {p.name: p.read_text() for p in out.iterdir()}


def test_leaves_the_files_of_the_contract(tmp_path):
    result = go(tmp_path, provenance={"model": "bundled"})
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["evaluation"] for line in history] == list(range(SMALL.forwards))
    best = min(history, key=lambda line: line["loss"])
    portable = min((x for x in history if not x["start_tokens"]), key=lambda line: line["loss"])
    for name, line in (("rescale.json", best), ("portable.json", portable)):
        rescale = Rescale.load(tmp_path / name)
        assert list(rescale.factors) == line["factors"]
        assert rescale.start_tokens == line["start_tokens"]
        assert rescale.attention_factor == line["attention_factor"] == 1.17
        assert rescale.provenance["loss"] == line["loss"]
        assert rescale.searched_documents == ("d",)
    assert result.best_loss == best["loss"]
    assert result.starts.keys() == {"pi", "ntk", "yarn"}


@pytest.mark.parametrize("fail_at", [1, 2, 12, 13, 25, 52])
def test_an_interrupted_search_ends_as_if_it_was_not(tmp_path, fail_at):
    whole = Loss()
    go(tmp_path / "whole", whole)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", Loss(fail_at))
    rest = Loss()
    go(tmp_path / "cut", rest)
    assert rest.calls == whole.calls - (fail_at - 1)  # only the one under way is lost
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_line_cut_short_by_a_kill_is_computed_again(tmp_path):
    go(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", Loss(20))
    history = tmp_path / "cut" / "history.jsonl"
    history.write_bytes(history.read_bytes()[:-30])
    rest = Loss()
    go(tmp_path / "cut", rest)
    assert rest.calls == SMALL.forwards - 18
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_finished_search_computes_nothing(tmp_path):
    go(tmp_path)
    before, again = contents(tmp_path), Loss()
    result = go(tmp_path, again)
    assert (again.calls, result.computed, result.evaluations) == (0, 0, SMALL.forwards)
    assert contents(tmp_path) == before


def of_windows(rescale, window=None, grad=False):
    """Four windows, of which each disagrees a little with the bowl."""
    centre = bowl(SPACE.nearest(rescale))
    each = tuple(centre * (1 + 0.01 * number) for number in range(4))
    return Result(sum(each) / 4, window_losses=each)


def test_the_gain_is_paired_over_the_same_windows(tmp_path):
    result = go(tmp_path, of_windows, cost=EvaluationCost(4))
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    starts = {line["start"]: line for line in lines if line["start"]}
    name, loss = result.best_start
    assert loss == min(line["loss"] for line in starts.values()) == starts[name]["loss"]
    best = min(lines, key=lambda line: line["loss"])
    before, after = starts[name]["window_losses"], best["window_losses"]
    differences = [a - b for a, b in zip(before, after, strict=True)]
    assert result.gain == pytest.approx(statistics.mean(differences))
    error = statistics.stdev(differences) / 2
    assert result.gain_standard_error == pytest.approx(error)
    again = go(tmp_path, of_windows, cost=EvaluationCost(4))
    assert again.computed == 0
    assert (again.gain, again.gain_standard_error) == (result.gain, result.gain_standard_error)
    said = describe_gain(result)
    assert all(
        text in said for text in (name, f"{loss:.4f}", f"{result.gain:.4f}", f"± {error:.4f}")
    )


def test_with_one_window_the_best_may_be_a_step_of_the_descent(tmp_path):
    """Its loss comes with a gradient, and with no losses of single windows."""
    calls = []

    def loss(rescale, window=None, grad=False):
        calls.append(grad)
        found = 5.0 - len(calls) / 100 if grad else 6.0  # the last step is the best of all
        numbers = len(rescale.factors)
        return Result(found, (0.1,) * numbers) if grad else Result(found, window_losses=(found,))

    config = GradientSearchConfig(windows=1, budget=27)
    cost = EvaluationCost(1, 2.0)
    result = go(tmp_path, loss, identity=identity(config=config), cost=cost)
    assert any(calls)
    assert result.best_loss < 5
    assert result.gain == pytest.approx(result.best_start[1] - result.best_loss)
    assert result.gain_standard_error is None
    assert "one window gives no standard error" in describe_gain(result)


def test_a_search_that_gains_nothing_returns_its_start_and_says_so(tmp_path):
    result = go(tmp_path, Loss(of=lambda candidate: 1.0), budget=5)
    name, _ = result.best_start
    start = problem(SPACE).starts[name]
    assert result.best.factors == SPACE.rescale(start).factors
    assert (result.gain, result.gain_standard_error) == (0.0, None)
    assert f"No candidate beats the best start, {name}" in describe_gain(result)


def test_fixed_start_tokens_leave_nothing_portable(tmp_path):
    fixed = dataclasses.replace(SPACE, start_tokens=(8,))
    begin = {"pi": dataclasses.replace(problem(SPACE).starts["pi"], start_tokens=8)}
    result = run_algorithm(
        identity(config=small(budget=5)), Problem(fixed, begin), Loss(), tmp_path
    )
    assert result.best.start_tokens == 8
    assert result.portable is None
    assert not (tmp_path / "portable.json").exists()


def test_a_budget_can_be_raised(tmp_path):
    go(tmp_path / "whole", budget=30)
    assert go(tmp_path / "steps", budget=15).evaluations == 15
    go(tmp_path / "steps", budget=30)
    assert contents(tmp_path / "steps") == contents(tmp_path / "whole")


def test_a_smaller_budget_forgets_nothing(tmp_path):
    go(tmp_path)
    before, loss = contents(tmp_path), Loss()
    result = go(tmp_path, loss, budget=5)
    assert (loss.calls, result.evaluations) == (0, SMALL.forwards)
    assert contents(tmp_path) == before


def test_a_damaged_line_costs_what_follows_it(tmp_path, caplog):
    go(tmp_path / "whole")
    go(tmp_path / "hurt")
    history = tmp_path / "hurt" / "history.jsonl"
    lines = history.read_text().splitlines()
    lines[30] = lines[30][:40]
    history.write_text("\n".join(lines) + "\n")
    loss = Loss()
    go(tmp_path / "hurt", loss)
    assert loss.calls == SMALL.forwards - 30
    assert "line 31 is damaged" in caplog.text
    assert contents(tmp_path / "hurt") == contents(tmp_path / "whole")


def test_two_processes_cannot_share_a_directory(tmp_path):
    with only_process(tmp_path), pytest.raises(ValueError, match=r"another process.*`out`"):
        go(tmp_path)
    go(tmp_path, budget=3)


def test_patience(tmp_path):
    result = go(tmp_path, Loss(of=lambda candidate: 1.0), patience=2)
    assert result.evaluations == 12 + 2 * 8


def test_nan_loses_and_is_reported(tmp_path):
    def sometimes(candidate):
        return math.nan if candidate.start_tokens else bowl(candidate)

    result = go(tmp_path, Loss(of=sometimes))
    assert result.not_finite > 0
    assert result.best.start_tokens == 0
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert sum(line["loss"] is None for line in lines) == result.not_finite
    again = Loss()
    go(tmp_path, again)
    assert again.calls == 0


def test_a_start_without_a_finite_loss_is_none_that_may_win(tmp_path):
    pi = problem(SPACE).starts["pi"]
    result = go(tmp_path, Loss(of=lambda c: math.nan if c == pi else bowl(c)))
    assert result.starts.keys() == {"ntk", "yarn"}


def test_nothing_finite_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"none of 52 .*float32"):
        go(tmp_path, Loss(of=lambda candidate: math.inf))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": 1}, "seed"),
        ({"model": "other"}, "model"),
        ({"length": 4096}, "length"),
        ({"config": small(parents=5)}, "parents"),
    ],
)
def test_another_search_is_refused_by_field(tmp_path, changes, field):
    go(tmp_path, budget=5)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"differs in {field} "):
        go(tmp_path, identity=identity(**changes))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"schema": 9, "config": {}, "config_hash": ""}']
)
def test_a_damaged_state_is_refused(tmp_path, content):
    go(tmp_path, budget=5)
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(ValueError, match=r"state\.json is damaged"):
        go(tmp_path)


def test_a_search_of_an_older_layout_is_refused_as_such(tmp_path):
    go(tmp_path, budget=5)
    state = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps(state | {"schema": 1}))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"schema 1, .*`out`"):
        go(tmp_path)
    assert contents(tmp_path) == before


def test_a_history_of_something_else_is_refused(tmp_path):
    go(tmp_path, budget=5)
    history = tmp_path / "history.jsonl"
    lines = history.read_text().splitlines()
    history.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=r"history\.jsonl .*evaluation 0,"):
        go(tmp_path)


def test_a_history_without_state_is_refused(tmp_path):
    (tmp_path / "history.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"history\.jsonl .*state\.json"):
        go(tmp_path)


def test_progress_is_reported(tmp_path):
    seen = []
    go(tmp_path, report=seen.append)
    assert [p.evaluations for p in seen] == list(range(53))
    assert all(p.total == 52 for p in seen)
    assert seen[1].seconds_left is not None
    assert [p.best for p in seen] == sorted((p.best for p in seen), reverse=True)


def fast(out, fail_at=None, **more):
    """A gradient search with a family of ramps, five windows and n̂."""
    losses = Loss(fail_at)

    def loss(rescale, window=None, grad=False):
        found = losses(rescale, window).loss + 0.01 * (window or 0)
        factors = SPACE.multipliers(SPACE.nearest(rescale))
        return Result(found, tuple((2 * factors * (factors - 3)).tolist()) if grad else ())

    turns = SPACE.start.original_max_position_embeddings * SPACE.start.inv_freq / (2 * np.pi)
    family = dataclasses.replace(
        problem(SPACE), ramp=lambda f, g: SPACE.rounded(8 ** ramp(turns, f, g), 0)
    )
    here = identity(config=GradientSearchConfig())
    result = run_algorithm(here, family, loss, out, cost=EvaluationCost(5, 2.66), **more)
    return result, losses.calls


def test_the_ramps_of_a_fast_search_are_its_starts(tmp_path):
    seen = []
    result, _ = fast(tmp_path, report=seen.append)
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert list(result.starts)[:4] == ["ntk", "yarn", "ramp 32-1", "ramp 128-1"]
    first, whole = history[: 2 * len(result.starts)], history[2 * len(result.starts)]
    assert [line["window"] for line in first] == [0, 1] * len(result.starts)
    means = [(a["loss"] + b["loss"]) / 2 for a, b in zip(first[::2], first[1::2], strict=True)]
    assert list(result.starts.values()) == pytest.approx(means)
    assert "window" not in whole
    assert whole["start"] == min(result.starts, key=lambda name: result.starts[name]) != "yarn"
    # A ramp with one of its two windows known is not set beside the others.
    assert [len(now.starts) for now in seen[:8]] == [0, 1, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("fail_at", [1, 2, 4, 9, 20, 30, 40])
def test_an_interrupted_fast_search_ends_as_if_it_was_not(tmp_path, fail_at):
    _, calls = fast(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fast(tmp_path / "cut", fail_at)
    assert fast(tmp_path / "cut")[1] == calls - (fail_at - 1)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
