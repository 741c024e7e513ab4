"""Progress: what is said, when, and whether the time left is right."""

import io
import json
import re
import time
from pathlib import Path

import pytest
from rich.table import Table

from longrope.progress import announced, plain_console, progress, seconds_left

RECORDED = json.loads((Path(__file__).parent / "step_times.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("recorded", RECORDED, ids=[stage["stage"] for stage in RECORDED])
def test_time_left_is_right_within_half_of_it_after_a_twentieth(recorded):
    """Replays the steps of a real run (benchmarks/step_times.py)."""
    steps = [(cost, seconds) for cost, seconds in recorded["steps"]]
    whole = sum(seconds for _, seconds in steps)
    passed = 0.0
    for number, (_, seconds) in enumerate(steps, 1):
        passed += seconds
        if not 0.05 * whole <= passed <= 0.95 * whole:
            continue
        left = seconds_left(steps[:number], sum(cost for cost, _ in steps[number:]))
        assert left is not None
        assert whole - passed == pytest.approx(left, rel=0.5)
        assert left <= 1.5 * (whole - passed)


def test_nothing_measured_is_no_estimate():
    assert seconds_left([], 5) is None
    assert seconds_left([(2, 1.0)], 5) == 2.5
    assert seconds_left([(1, 100.0), (1, 1.0)], 5) == 5.0  # the first includes the start


def test_long_work_says_so_within_two_seconds_and_short_work_nothing(capfd):
    with announced("loading"), progress("measure", 2) as advance:
        advance(0, "the first")
    assert capfd.readouterr().err == ""
    started, said = time.monotonic(), ""
    with announced("loading"), progress("measure", 2) as advance:
        advance(0, "the first")
        while said.count("\n") < 2:
            assert time.monotonic() - started < 2.5
            time.sleep(0.05)
            said += capfd.readouterr().err
        advance(2, "the last")
    assert "loading …" in said
    assert "measure: the first …" in said
    assert capfd.readouterr().err == "measure 2/2 the last\n"


@pytest.mark.parametrize(
    "name", ["[/x]", "[bold]x", ":warning: [link=https://x]y", "{x}", "a\\[b]"]
)
def test_names_are_printed_as_they_are(monkeypatch, name):
    """In lines, tables, rules and on a progress bar."""
    screen = io.StringIO()
    for terminal in (False, True):
        shown = plain_console(stderr=True)
        shown.file, shown._force_terminal, shown.width = screen, terminal, 200
        shown.print(name)
        shown.print(Table(name, name, title=name, show_edge=False))
        shown.rule(name)
    monkeypatch.setattr("longrope.progress.console", shown)
    with progress(name, 2) as advance:
        advance(1, name)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).splitlines()
    assert sum(name in line for line in lines) >= 9
    assert sum(line.count(name) for line in lines) >= 12
