"""Searches that are stopped, killed, or shared by processes: real signals, real ranks."""

import json
import re
import shutil
import signal
import time

import pytest

from kills import killed_at
from longrope.cli import app
from longrope.files.stores import read_arrays, write_arrays
from program import MAIN, history, lines, run, start, succeeds

PAPER = ["--population", 4, "--mutations", 2, "--crossovers", 1]
FAST = ["--algorithm", "gradient"]


@pytest.mark.parametrize(
    ("number", "background"),
    [
        (signal.SIGINT, False),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
        (signal.SIGTERM, True),
        pytest.param(signal.SIGHUP, False, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_with_one_line(small_search, tmp_path, number, background):
    """Ctrl-C, a scheduler's SIGTERM, also of a job that ignores Ctrl-C, a terminal that closes."""
    # The tests may themselves run in the background, which hands on what it ignores.
    interrupt = "SIG_IGN" if background else "default_int_handler"
    set_up = (
        "import signal\n"
        f"signal.signal({int(number)}, signal.SIG_DFL)\n"
        f"signal.signal(signal.SIGINT, signal.{interrupt})\n"
    )
    process = start(*small_search, "--out", tmp_path, code=set_up + MAIN)
    while not (tmp_path / "history.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    done = process.wait()
    assert done.returncode == 128 + number
    last = done.stderr.splitlines()[-1]
    assert last == "longrope: stopped; run the same command to resume"


@pytest.mark.slow
def test_nohup_outlives_its_terminal(small_search, tmp_path):
    code = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + MAIN
    process = start(*small_search, "--budget", 6, "--out", tmp_path, code=code)
    while not (tmp_path / "history.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    assert process.wait().returncode == 0


@pytest.mark.parametrize(
    ("algorithm", "after"),
    [
        pytest.param(PAPER, 1, marks=pytest.mark.slow),
        pytest.param(PAPER, 5, marks=pytest.mark.slow),
        pytest.param(FAST, 2, marks=pytest.mark.slow),
        (FAST, 6),
    ],
)
def test_kill_9_costs_one_evaluation(small_search, tmp_path, algorithm, after):
    options = ["--budget", 9, *algorithm]
    succeeds(*small_search, *options, "--out", tmp_path / "whole")
    cut = tmp_path / "cut"
    process = start(*small_search, *options, "--out", cut)
    process.kill_when(lambda: lines(cut / "history.jsonl") >= after)
    known = lines(cut / "history.jsonl")
    summary = json.loads(succeeds(*small_search, *options, "--out", cut, "--json"))
    assert summary["computed"] == len(history(tmp_path / "whole")) - known
    for name in ("history.jsonl", "rescale.json", "portable.json", "state.json"):
        assert (cut / name).read_text() == (tmp_path / "whole" / name).read_text(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "result"),
    [
        (
            [
                "compare",
                "--target",
                "2x",
                "--methods",
                "none,pi,ntk",
                "--tokens-per-document",
                2048,
            ],
            "compare.json",
        ),
        (["evaluate", "passkey", "--lengths", "256,512", "--trials", 40], "passkey.json"),
    ],
)
def test_kill_9_of_a_measurement_costs_what_was_under_way(texts, tmp_path, verb, result):
    options = [*verb, "--chunk-size", 64]
    options += ["--data", texts] if "compare" in verb else []
    succeeds(*options, "--out", tmp_path / "whole")
    cut, other = tmp_path / "cut", tmp_path / "other"
    kept = cut / "unfinished"
    killed = start(*options, "--out", cut).kill_when(lambda: any(measured(kept)))
    assert killed.returncode == -signal.SIGKILL
    assert not (cut / result).exists()
    shutil.copytree(cut, other)
    succeeds(*options, "--out", cut)
    assert (cut / result).read_text() == (tmp_path / "whole" / result).read_text()
    assert not kept.exists()
    # What was kept is taken as it is: something else there, something else in the result.
    for file in measured(other / "unfinished"):
        if file.suffix == ".safetensors":
            arrays = read_arrays(file)
            assert arrays is not None
            write_arrays(file, {"losses": arrays["losses"] + 1})
        else:
            file.write_text(re.sub("true|false", swapped, file.read_text()))
    succeeds(*options, "--out", other)
    assert (other / result).read_text() != (tmp_path / "whole" / result).read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "verb",
    [
        ["search", "bundled", "--target", "2x", "--windows", 2, "--budget", 4, "--data"],
        ["evaluate", "needle", "--lengths", "128,256", "--trials", 3, "--data"],
    ],
    ids=["search", "evaluate"],
)
def test_a_kill_at_any_write_blocks_nothing(verb, texts, tmp_path):
    """Each start finds what the ones before left; the last leaves the files of a whole run."""

    def start(out):
        arguments = [*verb, texts, "--chunk-size", 64, "--out", out]
        app([str(argument) for argument in arguments], standalone_mode=False)

    start(tmp_path / "whole")  # here, so that the children have everything imported
    steps = 0
    while killed_at(steps, lambda: start(tmp_path / "cut")):
        steps += 1
    assert steps > 15
    assert without_times(tmp_path / "cut") == without_times(tmp_path / "whole")


def without_times(directory):
    """The content of each file in a directory, less the seconds that its work took."""
    return {
        str(file.relative_to(directory)): re.sub(rb'"seconds": [0-9.e+-]+', b"", file.read_bytes())
        for file in directory.rglob("*")
        if file.is_file()
    }


def swapped(answer):
    return "false" if answer[0] == "true" else "true"


def measured(kept):
    """The files of what was measured, whole ones."""
    return [file for file in kept.glob("[!.]*") if file.stat().st_size]


@pytest.mark.parametrize(
    ("algorithm", "processes"),
    [
        pytest.param(PAPER, 2, marks=pytest.mark.slow),
        pytest.param(PAPER, 3, marks=pytest.mark.slow),
        ([*FAST, "--windows-per-step", 2], 2),
    ],
)
def test_ranks_agree_candidate_for_candidate(small_search, tmp_path, algorithm, processes):
    options = ["--budget", 8, *algorithm]
    succeeds(*small_search, *options, "--out", tmp_path / "one")
    succeeds(*small_search, *options, "--out", tmp_path / "many", ranks=processes)
    assert history(tmp_path / "many") == history(tmp_path / "one")
    for name in ("rescale.json", "portable.json", "state.json"):
        assert (tmp_path / "many" / name).read_text() == (tmp_path / "one" / name).read_text()


def test_a_rank_that_dies_ends_the_run_and_leaves_what_resumes(small_search, tmp_path):
    options = ["--budget", 40, "--out", tmp_path / "out"]
    code = (
        "import os, signal, sys, longrope.search.objective as o\n"
        "original, calls = o.Objective.__call__, []\n"
        "def dying(self, *trial):\n"
        "    calls.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(calls) == 3:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(self, *trial)\n"
        "o.Objective.__call__ = dying\n"
        "from longrope.cli import main\nmain()\n"
    )
    done = run(*small_search, *options, code=code, ranks=2)
    assert done.returncode != 0
    assert "longrope: error: another process" in done.stderr
    known = history(tmp_path / "out")
    assert len(known) == 4
    options[1] = 6
    summary = json.loads(succeeds(*small_search, *options, "--json"))
    assert (summary["evaluations"], summary["computed"]) == (6, 2)
    assert history(tmp_path / "out")[:4] == known
