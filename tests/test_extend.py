"""The whole system on a model of two layers: every stage, killed in each, and what it leaves."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from longrope.extend import _finetune, open_run
from longrope.parallel import Ranks
from longrope.recipe import load_recipe, make_recipe
from longrope.rope.rescale import Rescale

STAGES = [
    "search",
    "finetune",
    "second-search",
    "settle",
    "recovery-1",
    "recovery-2",
    "recovery",
    "export",
    "evaluate",
    "report",
]
SMALL = {"population": 6, "mutations": 2, "crossovers": 2, "iterations": 3, "parents": 4}
RECIPE = {
    "target": "16x",
    "dtype": "float32",
    "search": {"samples": 2, "budget": 9},
    "finetune": {
        "steps": 6,
        "settle_steps": 8,
        "batch": 2,
        "learning_rate": 1e-3,
        "precision": "float32",
        "warmup": 2,
        "save_every": 2,
        "passkey_share": 0.3,
        "short_share": 0.5,
        "distill": True,
    },
    "second_search": {"samples": 1, "algorithm": "paper", **SMALL},
    "recovery": {"samples": 2, "budget": 9},
    "evaluate": {
        "methods": ["none", "yarn"],
        "documents": 2,
        "lengths": ["128", "512", "1024", "64"],
        "passkey_trials": 0,
    },
}


def command(*arguments, verb="extend"):
    return [sys.executable, "-m", "longrope", verb, *map(str, arguments)]


def run(*arguments, verb="extend", code=0):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(*arguments, verb=verb),
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


def evaluated(*arguments):
    return json.loads(run(*arguments, verb="evaluate").stdout)


@pytest.fixture(scope="module")
def arguments(checkpoints, texts, tmp_path_factory):
    """Model, recipe and data of every run here."""
    recipe = tmp_path_factory.mktemp("recipe") / "small.yaml"
    content = RECIPE | {"model": str(checkpoints("llama")), "data": [str(texts)]}
    recipe.write_text(yaml.safe_dump(content))
    return ["--recipe", recipe]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """A run that nothing interrupted, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, run(*arguments, "--out", out)


def results(out):
    found = json.loads((out / "results.json").read_text())
    for stage in found["stages"]:
        del stage["seconds"]
    return found


def test_leaves_what_other_programs_read(finished):
    out, done = finished
    for name in STAGES:
        assert (out / name / "done.json").exists(), name
    found = json.loads((out / "results.json").read_text())
    assert found["original_length"] == 64
    assert (found["trained_length"], found["target"]) == (128, 1024)
    rows = {(row["method"], row["length"]): row for row in found["perplexity"]}
    for method in ("none", "yarn", "longrope"):
        for length in (64, 128, 512, 1024):
            row = rows[method, length]
            assert row["perplexity"] > 1
            assert row["tokens"] == rows["none", 64]["tokens"]
            assert row["standard_error"] is None  # of one document
    short = [64, 128][: found["recovery_length"] // 64]
    assert [row["length"] for row in found["recovery"]] == short
    assert {stage["name"] for stage in found["stages"]} == set(STAGES[:-2])
    assert all(stage["seconds"] >= 0 for stage in found["stages"])
    work = {stage["name"]: stage["forwards"] for stage in found["stages"]}
    assert all(work[name] > 0 for name in STAGES[:6])
    assert [stage["name"] for stage in found["plan"]] == STAGES
    plan = (out / "report.md").read_text().partition("## Plan and cost")[2]
    for stage in found["plan"][:6]:
        assert f"| {stage['name']} | {stage['length']:,} | {stage['tokens']:,} |" in plan
    assert yaml.safe_load((out / "recipe.yaml").read_text())["finetune"]["steps"] == 6
    assert done.stdout.strip().endswith("report.html")
    assert "perplexity at 1,024 tokens" in done.stdout


def test_what_was_trained_last_is_exported(finished):
    from safetensors.torch import load_file

    out, _ = finished
    exported, settled, tuned = (
        load_file(out / name / "model.safetensors")
        for name in ("model", "settle/model", "finetune/model")
    )
    for name, weight in exported.items():
        assert weight.equal(settled[name])
    assert any(not weight.equal(tuned[name]) for name, weight in settled.items())


def test_every_training_is_under_the_factors_and_on_the_pieces_for_it(finished, monkeypatch):
    out, _ = finished
    opened = open_run(load_recipe(out / "recipe.yaml"), out, Ranks())
    given = {}

    def kept(loaded, rescale, short, pieces, settings, directory, *_, **__):
        given[directory.name] = rescale, pieces
        return [{"loss": 1.0}]

    monkeypatch.setattr("longrope.extend.finetune", kept)
    for name in ("finetune", "settle"):
        _finetune(opened, opened.plan[name])
    rescale, pieces = given["finetune"]
    assert rescale == Rescale.load(out / "search" / "rescale.json")
    assert "places" not in pieces[0]
    settled, jumping = given["settle"]
    assert settled == Rescale.load(out / "second-search" / "rescale.json")
    assert settled.max_position_embeddings == 1024
    assert jumping.reach == 1280  # so that the target is not the edge of what is seen
    assert max(int(jumping[i]["places"].max()) for i in range(8)) > 300
    assert not torch.equal(pieces[0]["input_ids"], jumping[0]["input_ids"])


def test_the_factors_are_in_their_bounds(finished):
    out, _ = finished
    trained, long, short = (
        Rescale.load(out / name) for name in ("search/rescale.json", "rescale.json", "short.json")
    )
    ratios = [b / a for a, b in zip(trained.factors, long.factors, strict=True)]
    assert all(1 <= ratio <= 1.25 * 8 + 1e-9 for ratio in ratios)
    assert ratios == sorted(ratios)
    assert max(short.factors) <= 1.25 * max(trained.factors) + 0.01
    assert short.attention_factor == long.attention_factor
    record = json.loads((out / "recovery" / "done.json").read_text())
    assert record["recovery_length"] == short.max_position_embeddings
    means = {length: sum(by.values()) for length, by in record["losses"].items()}
    assert means[str(record["recovery_length"])] == min(means.values())


def test_the_checkpoint_computes_what_was_measured(finished):
    """Plain transformers' perplexity on the exported model against the pair's."""
    from transformers import AutoModelForCausalLM

    from longrope.generate import load_extended
    from longrope.rope.install import installed

    out, _ = finished
    plain = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    loaded, pair = load_extended(str(out), dtype="float32")
    assert loaded.facts.original_max_position_embeddings == 64  # not the recovery length
    ids = torch.randint(3, 1500, (1, 600), generator=torch.Generator().manual_seed(0))
    for tokens in (50, pair.recovery_length, pair.recovery_length + 1, 600):
        rescale = pair.choose(tokens)
        exported = rescale.replace(attention_factor=pair.long.attention_factor)
        with torch.no_grad(), installed(loaded.model, exported):
            expected = loaded.model(input_ids=ids[:, :tokens]).logits
        with torch.no_grad():
            found = plain(input_ids=ids[:, :tokens]).logits
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


def test_the_readme_goes_on_from_a_run(finished, tmp_path):
    """Its command that generates, and its code that loads the result."""
    out, _ = finished
    readme = (
        (Path(__file__).parents[1] / "README.md").read_text().replace("runs/bundled-64x", str(out))
    )
    (line,) = [line for line in readme.splitlines() if line.startswith("longrope generate")]
    (tmp_path / "long.py").write_text("import os\n" * 60)
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if str(out) in c]
    module = ["-m", *shlex.split(line), "--max-new-tokens", "5"]
    for asked in (module, ["-c", code]):
        done = subprocess.run(
            [sys.executable, *asked], cwd=tmp_path, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
    assert done.stdout.startswith("<|bos|>import os")


def test_a_free_attention_factor_is_our_own_runtimes(finished, tmp_path):
    from longrope.generate import load_extended

    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    short = Rescale.load(out / "short.json")
    provenance = {**short.provenance, "free_attention_factor": 1.03125}
    short.replace(provenance=provenance).save(out / "short.json")
    _, pair = load_extended(str(out))
    assert pair.short == short.replace(attention_factor=1.03125, provenance=provenance)
    assert pair.long == Rescale.load(out / "rescale.json")
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["rope_parameters"]["attention_factor"] == pair.long.attention_factor


def test_run_again_it_computes_nothing(finished, arguments):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.json*")}
    run(*arguments, "--out", out)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.json*")}


def test_killed_in_every_stage_it_ends_the_same(finished, arguments, tmp_path):
    out = tmp_path / "killed"
    signs = [
        ("search/history.jsonl", 3),
        ("finetune/checkpoints/checkpoint-2/complete.json", 1),
        ("finetune/done.json", 1),
        ("second-search/history.jsonl", 4),
        ("settle/checkpoints/checkpoint-2/complete.json", 1),
        ("recovery-1/history.jsonl", 2),
        ("recovery-2/done.json", 1),
        ("model/config.json", 1),
        ("evaluate/cells.jsonl", 5),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    within = []  # the stages that had begun and were not done
    for name, lines in signs:
        process = subprocess.Popen(
            command(*arguments, "--out", out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        file = out / name
        deadline = time.monotonic() + 120
        while not (file.exists() and file.read_bytes().count(b"\n") >= lines):
            if process.poll() is not None:
                break
            assert time.monotonic() < deadline, name
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        within += [s for s in STAGES if (out / s).exists() and not (out / s / "done.json").exists()]
    # The others may be over before the signal.
    assert {"search", "finetune", "second-search", "settle", "evaluate"} <= set(within), within
    run(*arguments, "--out", out)
    whole, _ = finished
    assert results(out) == results(whole)
    for name in ("rescale.json", "short.json"):
        assert Rescale.load(out / name) == Rescale.load(whole / name)
    for name in (
        "finetune/loss.jsonl",
        "settle/loss.jsonl",
        "search/history.jsonl",
        "second-search/history.jsonl",
    ):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    weights = [d / "model" / "model.safetensors" for d in (out, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_processes_share_the_evaluation(finished, arguments, tmp_path):
    whole, _ = finished
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    wanted = len((out / "evaluate" / "cells.jsonl").read_text().splitlines())
    for name in ("evaluate", "report"):
        shutil.rmtree(out / name)
    # Three cannot train a batch of two, but here it is trained.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    done = subprocess.run(
        [sys.executable, *launcher, *command(*arguments, "--out", out)[1:]],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shares = [
        len((out / "evaluate" / name).read_text().splitlines())
        for name in ("cells.jsonl", "cells.1.jsonl", "cells.2.jsonl")
    ]
    assert sum(shares) == wanted
    assert max(shares) - min(shares) <= 1
    assert results(out) == results(whole)
    assert done.stdout.count("report.html") == 1


def test_a_team_shares_each_sequence_of_the_evaluation(finished, arguments, tmp_path):
    whole, _ = finished
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in ("evaluate", "report"):
        shutil.rmtree(out / name)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    team = ["--sequence-parallel", "2", "--out", out]
    done = subprocess.run(
        [sys.executable, *launcher, *command(*arguments, *team)[1:]],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    leaders = [(out / "evaluate" / name).read_text() for name in ("cells.jsonl", "cells.2.jsonl")]
    others = [(out / "evaluate" / name).read_text() for name in ("cells.1.jsonl", "cells.3.jsonl")]
    assert all(leaders)
    assert not any(others)
    rows = zip(results(out)["perplexity"], results(whole)["perplexity"], strict=True)
    for found, expected in rows:
        assert found.pop("perplexity") == pytest.approx(expected.pop("perplexity"), rel=1e-4)
        assert found["method"] == expected["method"]
        assert found["tokens"] == expected["tokens"]


def test_another_evaluation_of_a_finished_run(finished, arguments, tmp_path, benchmark_data):
    """Pass keys, and what lm-eval asks of the model before, and after without and with recovery."""
    out, _ = finished
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    recipe["evaluate"] |= {"passkey_trials": 2, "needle_trials": 1}
    recipe["evaluate"]["lengths"] = ["128", "512", "1024", "64", "256"]
    recipe["evaluate"] |= {"benchmarks": ["arc_challenge"], "benchmark_data": str(benchmark_data)}
    recipe["evaluate"] |= {"benchmark_questions": 4, "benchmark_shots": 1}
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
    parts = (out / "evaluate" / "parts.jsonl").read_text().splitlines()
    assert sum("passkey" in json.loads(part)["of"] for part in parts) == 2  # kept one by one
    (row,) = found["benchmarks"]
    assert (row["task"], row["questions"]) == ("arc_challenge", 4)
    assert row["difference"] == pytest.approx(row["with"] - row["original"])
    assert 0 <= row["without"] <= 1
    assert "| arc_challenge | 4 |" in (out / "report.md").read_text()
    # What the other verb asks of a run: the same questions, of the same two models.
    asked = ["--benchmarks", "arc_challenge", "--benchmark-data", benchmark_data, "--json"]
    (again,) = evaluated(out, *asked, "--questions", 4, "--shots", 1)["benchmarks"]
    assert (again["task"], again["questions"]) == ("arc_challenge", 4)
    assert again["original"] == row["original"]
    keys = evaluated(out, "--passkey", "--lengths", "128", "--trials", 2, "--json")["passkey"]
    own = [(r["correct"], r["trials"]) for r in found["passkey"] if r["length"] == 128]
    assert [(r["correct"], r["trials"]) for r in keys] == own
    recipe["evaluate"]["benchmark_data"] = "nowhere"
    file.write_text(yaml.safe_dump(recipe))
    before = (out / "recipe.yaml").read_text()
    assert "nowhere: no such folder" in run("--recipe", file, "--out", out, code=2).stderr
    # What cannot be measured leaves what was.
    assert (out / "evaluate" / "done.json").exists()
    assert (out / "recipe.yaml").read_text() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--seed", "5"], "holds another run; it differs in seed (there 0, now 5)"),
        (["--target", "2048x"], "one extension reaches 512x"),
    ],
)
def test_refusals_are_one_line(finished, arguments, changes, message):
    out, _ = finished
    done = run(*arguments, "--out", out, *changes, code=2)
    (line,) = done.stderr.strip().splitlines()
    assert message in line


def test_a_run_begun_by_an_older_version_is_gone_on_with_where_nothing_differs(
    finished, arguments, tmp_path
):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    del recipe["finetune"]["lora"]  # as if it had not been known: it has its default
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run(*arguments, "--out", out)
    recipe["finetune"] |= {"answer_weight": 10.0, "steps": 7}
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run(*arguments, "--out", out, code=2)
    assert "finetune.steps (there 7, now 6)" in done.stderr
    assert "finetune.answer_weight (there 10.0, now not known)" in done.stderr


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_the_teacher_is_the_model_as_it_came(checkpoints, texts, tmp_path, kind):
    """Also where its scaling is replaced in what is trained."""
    scaling = {"rope_theta": 1e4, "rope_type": kind, "factor": 4.0}
    scaling |= {"original_max_position_embeddings": 16} if kind == "yarn" else {}
    path = tmp_path / "model"
    shutil.copytree(checkpoints("llama"), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rope_parameters": scaling}))
    recipe = make_recipe({"model": str(path), "target": "2x", "existing_scaling": "replace"})
    opened = open_run(recipe, tmp_path / "out", Ranks())
    length = opened.plan.original
    ids = torch.randint(3, 1500, (1, length), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        torch.testing.assert_close(opened.teacher().model(input_ids=ids).logits, expected)
        other = opened.original().model(input_ids=ids).logits
    assert ((other - expected).abs().max() > 0.01) == (kind == "yarn")


def test_a_directory_of_something_else_is_left_alone(arguments, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    done = run(*arguments, "--out", tmp_path, code=2)
    assert "is not empty and holds no run" in done.stderr


def test_too_little_text_is_said_before_any_work(arguments, tmp_path, checkpoints):
    text = tmp_path / "short.txt"
    text.write_text("import os\n" * 50)
    out = tmp_path / "out"
    done = run(*arguments, "--data", text, "--out", out, code=2)
    assert "too few tokens to search on" in done.stderr
    assert not (out / "search").exists()


def test_dry_run_prices_every_stage_and_runs_none(arguments, tmp_path):
    out = tmp_path / "out"
    done = run(*arguments, "--out", out, "--dry-run", "--memory", "8x80")
    for name in STAGES:
        assert name in done.stdout
    assert not out.exists()
    done = run(*arguments, "--out", out, "--dry-run", "--memory", "0.001", code=2)
    assert "are free; try" in done.stderr.splitlines()[-1]


def test_dry_run_counts_the_text(arguments, tmp_path, checkpoints):
    text, out = tmp_path / "short.txt", tmp_path / "out"
    text.write_text("import os\n" * 50)
    done = run(*arguments, "--data", text, "--out", out, "--dry-run", code=2)
    assert "one window of the target needs 1,024" in done.stderr.splitlines()[-1]
    assert not out.exists()
    # A price may be asked before there is any text, or more of the model than its config.
    bare = tmp_path / "model"
    bare.mkdir()
    shutil.copy(checkpoints("llama") / "config.json", bare)
    done = run(bare, "--target", "2x", "--out", out, "--dry-run")
    assert "the text is not there yet" in done.stderr
    done = run(bare, "--target", "2x", "--out", out, "--dry-run", "--lora", 4, code=2)
    assert "--lora is 4 and nothing is trained" in done.stderr
    # The remedy is one, in the default recipe too, which settles where a second search follows.
    done = run("--target", "8x", "--finetune", "--lora", 4, "--out", out, "--dry-run")
    assert "finetune" in done.stdout
    assert "settle" not in done.stdout


def test_stages_out_of_order_and_other_documents_are_refused(finished, arguments, tmp_path):
    whole, _ = finished
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "search")
    done = run(*arguments, "--out", out, code=2)
    assert "finetune was made from an earlier search, which is gone" in done.stderr
    shutil.rmtree(out)
    shutil.copytree(whole, out)
    (out / "evaluate" / "done.json").unlink()
    pools = json.loads((out / "pools.json").read_text())
    pools["evaluation"] = ["something else"]
    (out / "pools.json").write_text(json.dumps(pools))
    done = run(*arguments, "--out", out, code=2)
    assert "its evaluation documents are not those that it began with" in done.stderr


def test_start_tokens_stay_with_our_own_runtime(arguments, tmp_path, checkpoints, texts):
    """Trained and searched with n̂; the checkpoint, which cannot say it, is warned of."""
    recipe = RECIPE | {"model": str(checkpoints("llama")), "data": [str(texts)]}
    recipe |= {"target": "4x", "start_tokens": 4}
    recipe["evaluate"] = {"documents": 1, "methods": []}
    file, out = tmp_path / "r.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(recipe))
    done = run("--recipe", file, "--out", out)
    assert "start_tokens 4 is in rescale.json" in done.stderr
    assert Rescale.load(out / "rescale.json").start_tokens == 4
    config = json.loads((out / "model" / "config.json").read_text())
    long = Rescale.load(out / "rescale.json")
    assert config["rope_parameters"]["long_factor"] == list(long.factors)
    results = json.loads((out / "results.json").read_text())
    measured = {row["length"] for row in results["perplexity"] if row["method"] == "none"}
    assert measured == {row["length"] for row in results["recovery"]}
    assert max(measured) < results["target"]


def test_json_is_all_that_is_printed(finished, arguments):
    out, _ = finished
    assert json.loads(run(*arguments, "--out", out, "--json").stdout)["target"] == 1024
    priced = json.loads(run(*arguments, "--dry-run", "--json").stdout)
    assert [stage["name"] for stage in priced["stages"]] == STAGES
