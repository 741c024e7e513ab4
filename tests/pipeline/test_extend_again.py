"""A run gone on with: killed in every stage, by more processes, or with another evaluation."""

import json
import shutil

import pytest
import yaml

import longrope.pipeline.extend  # noqa: F401 (so that forked children need not)
from kills import killed_at
from longrope.cli import app
from longrope.rope.rescale import Rescale
from program import lines, start
from whole_run import STAGES, evaluated, results, run


def test_run_again_it_computes_nothing(finished, arguments):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.json*")}
    run(*arguments, "--out", out)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.json*")}


# A file of a run, and how many lines it has when the run is killed.
SEARCH, TRAINING = (
    ("search/history.jsonl", 3),
    ("finetune/checkpoints/checkpoint-2/complete.json", 1),
)
EVALUATION = ("evaluate/cells.jsonl", 5)
EVERY_STAGE = [
    SEARCH,
    TRAINING,
    ("finetune/done.json", 1),
    ("second-search/history.jsonl", 4),
    ("final-finetune/checkpoints/checkpoint-2/complete.json", 1),
    ("recovery-1/history.jsonl", 2),
    ("recovery-2/done.json", 1),
    ("model/config.json", 1),
    EVALUATION,
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signs", "surely"),
    [
        ([TRAINING, EVALUATION], {"finetune", "evaluate"}),
        (EVERY_STAGE, {"search", "finetune", "second-search", "final-finetune", "evaluate"}),
    ],
    ids=["two-stages", "every-stage"],
)
def test_killed_it_ends_the_same(finished, arguments, tmp_path, signs, surely):
    out = tmp_path / "killed"
    within = []  # the stages that had begun and were not done
    for name, number in signs:
        process = start("extend", *arguments, "--out", out)
        process.kill_when(lambda file=out / name, least=number: lines(file) >= least)
        within += [s for s in STAGES if (out / s).exists() and not (out / s / "done.json").exists()]
    # The others may be over before the signal.
    assert surely <= set(within), within
    run(*arguments, "--out", out)
    assert_same(out, finished[0])


@pytest.mark.slow
def test_killed_at_its_writes_it_ends_the_same(finished, arguments, tmp_path, request):
    """Each start finds what the ones before left; with --kill-stride 1 they die at every write."""
    out, stride = tmp_path / "killed", request.config.getoption("--kill-stride")

    def extend():
        app(["extend", *map(str, arguments), "--out", str(out)], standalone_mode=False)

    writes = 0
    while killed_at(writes, extend):
        writes += stride
    assert writes > 10
    assert_same(out, finished[0])
    assert not list(tmp_path.rglob("*longrope-tmp*"))


def assert_same(out, whole):
    """Compare what a run computed with that of a run that nothing interrupted."""
    assert results(out) == results(whole)
    for name in ("rescale.json", "short.json"):
        assert Rescale.load(out / name) == Rescale.load(whole / name)
    for name in (
        "finetune/loss.jsonl",
        "final-finetune/loss.jsonl",
        "search/history.jsonl",
        "second-search/history.jsonl",
    ):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    weights = [d / "model" / "model.safetensors" for d in (out, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_processes_share_the_evaluation(finished, arguments, tmp_path):
    whole, _ = finished
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    wanted = len((out / "evaluate" / "cells.jsonl").read_text().splitlines())
    for name in ("evaluate", "report"):
        shutil.rmtree(out / name)
    # Three cannot train a batch of two, but here it is trained.
    done = run(*arguments, "--out", out, ranks=3)
    shares = [
        len((out / "evaluate" / name).read_text().splitlines())
        for name in ("cells.jsonl", "cells.1.jsonl", "cells.2.jsonl")
    ]
    assert sum(shares) == wanted
    assert max(shares) - min(shares) <= 1
    assert results(out) == results(whole)
    assert done.stdout.count("report.html") == 1


@pytest.mark.slow
def test_a_group_shares_each_sequence_of_the_evaluation(finished, arguments, tmp_path):
    whole, _ = finished
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in ("evaluate", "report"):
        shutil.rmtree(out / name)
    run(*arguments, "--sequence-parallel", 2, "--out", out, ranks=4)
    leaders = [(out / "evaluate" / name).read_text() for name in ("cells.jsonl", "cells.2.jsonl")]
    others = [(out / "evaluate" / name).read_text() for name in ("cells.1.jsonl", "cells.3.jsonl")]
    assert all(leaders)
    assert not any(others)
    rows = zip(results(out)["perplexity"], results(whole)["perplexity"], strict=True)
    for found, expected in rows:
        assert found.pop("perplexity") == pytest.approx(expected.pop("perplexity"), rel=1e-4)
        assert found["method"] == expected["method"]
        assert found["tokens"] == expected["tokens"]


@pytest.mark.slow
def test_another_evaluation_of_a_finished_run(finished, arguments, tmp_path, benchmark_data):
    """Pass keys, and what lm-eval asks of the model before, and after without and with recovery."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    recipe["evaluate"] |= {"passkey_trials": 2, "passkey_trials_beyond": 0, "needle_trials": 1}
    recipe["evaluate"]["lengths"] = ["128", "512", "1024", "64", "256"]
    asked = {"tasks": ["arc_challenge"], "datasets": str(benchmark_data)}
    recipe["evaluate"]["benchmarks"] = asked | {"limit": 4, "num_fewshot": 1}
    file = tmp_path / "more.yaml"
    file.write_text(yaml.safe_dump(recipe))
    before = (out / "search" / "done.json").stat().st_mtime_ns
    run("--recipe", file, "--out", out)
    assert (out / "search" / "done.json").stat().st_mtime_ns == before
    found = json.loads((out / "results.json").read_text())
    assert sum(row["trials"] for row in found["passkey"]) == 2  # at 128; 64 holds no question
    for kind, lengths in (("passkey", {128}), ("needle", {128, 256, 512, 1024})):
        assert {row["length"] for row in found[kind]} == lengths
        assert all(0 <= row["correct"] <= row["trials"] for row in found[kind])
        assert all(0 < row["depth"] < 1 for row in found[kind])
        assert (out / "images" / f"{kind}.png").exists()
    assert not (out / "evaluate" / "unfinished").exists()
    (row,) = found["benchmarks"]
    assert (row["task"], row["questions"]) == ("arc_challenge", 4)
    assert row["difference"] == pytest.approx(row["with"] - row["original"])
    assert 0 <= row["without"] <= 1
    assert "| arc_challenge | 4 |" in (out / "report.md").read_text()
    # What the other verb asks of a run: the same questions, of the same two models.
    asked = ["--tasks", "arc_challenge", "--datasets", benchmark_data, "--json"]
    (again,) = evaluated("benchmarks", out, *asked, "--limit", 4, "--num-fewshot", 1)["benchmarks"]
    assert (again["task"], again["questions"]) == ("arc_challenge", 4)
    assert again["original"] == row["original"]
    keys = evaluated("passkey", out, "--lengths", "128", "--trials", 2, "--json")["passkey"]
    own = [(r["correct"], r["trials"]) for r in found["passkey"] if r["length"] == 128]
    assert [(r["correct"], r["trials"]) for r in keys] == own
    recipe["evaluate"]["benchmarks"]["datasets"] = "nowhere"
    file.write_text(yaml.safe_dump(recipe))
    before = (out / "recipe.yaml").read_text()
    assert "datasets='nowhere'" in run("--recipe", file, "--out", out, code=2).stderr
    # What cannot be measured leaves what was.
    assert (out / "evaluate" / "done.json").exists()
    assert (out / "recipe.yaml").read_text() == before


def test_a_run_begun_by_an_older_version_is_gone_on_with_where_nothing_differs(
    finished, arguments, tmp_path
):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    del recipe["finetune"]["lora"]  # as if it had not been known: it has its default
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run(*arguments, "--out", out)
    recipe["finetune"]["steps"] = 7
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run(*arguments, "--out", out, code=2)
    assert "finetune.steps (there 7, now 6)" in done.stderr
    recipe["finetune"]["answer_weight"] = 10.0  # a key of another layout
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run(*arguments, "--out", out, code=2)
    assert "older version" in done.stderr
    assert "answer_weight" in done.stderr


def test_stages_out_of_order_and_other_documents_are_refused(finished, arguments, tmp_path):
    whole, _ = finished
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "search")
    done = run(*arguments, "--out", out, code=2)
    assert f"{out / 'finetune'} " in done.stderr
    assert "earlier search" in done.stderr
    shutil.rmtree(out)
    shutil.copytree(whole, out)
    (out / "evaluate" / "done.json").unlink()
    splits = json.loads((out / "splits.json").read_text())
    splits["evaluation"] = ["something else"]
    (out / "splits.json").write_text(json.dumps(splits))
    done = run(*arguments, "--out", out, code=2)
    assert "evaluation documents" in done.stderr
    assert "(1 then," in done.stderr
