"""What is refused or priced before any long work starts."""

import shutil

import pytest

from whole_run import STAGES, run


def test_a_directory_of_something_else_is_left_alone(arguments, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    done = run(*arguments, "--out", tmp_path, code=2)
    assert f"{tmp_path} " in done.stderr
    assert "no run; " in done.stderr


def test_too_little_text_is_said_before_any_work(arguments, tmp_path, checkpoints):
    text = tmp_path / "short.txt"
    text.write_text("import os\n" * 50)
    out = tmp_path / "out"
    done = run(*arguments, "--data", text, "--out", out, code=2)
    assert "search on: " in done.stderr
    assert "1,024" in done.stderr
    assert not (out / "search").exists()


def test_a_plan_prices_every_stage_and_runs_none(arguments, tmp_path):
    out = tmp_path / "out"
    done = run(*arguments, "--gpus", "8x80GB", verb="plan")
    for name in STAGES:
        assert name in done.stdout
    assert not out.exists()
    done = run(*arguments, "--gpus", "0.001", verb="plan", code=2)
    assert "GB are free" in done.stderr.splitlines()[-1]


def test_a_plan_counts_the_text(arguments, tmp_path, checkpoints):
    text, out = tmp_path / "short.txt", tmp_path / "out"
    text.write_text("import os\n" * 50)
    done = run(*arguments, "--data", text, verb="plan", code=2)
    assert "needs 1,024" in done.stderr.splitlines()[-1]
    assert not out.exists()
    # A price may be asked before there is any text, or more of the model than its config.
    bare = tmp_path / "model"
    bare.mkdir()
    shutil.copy(checkpoints("llama") / "config.json", bare)
    done = run(bare, "--target", "2x", verb="plan")
    assert "usable text" in done.stderr
    done = run(bare, "--target", "2x", "--lora", 4, verb="plan", code=2)
    assert "--lora is 4" in done.stderr
    # In the default recipe too, whose final fine-tuning needs a second search.
    done = run("bundled", "--target", "8x", "--finetune", "--lora", 4, verb="plan")
    assert "finetune" in done.stdout
    assert "final-finetune" not in done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--seed", "5"], "seed (there 0, now 5)"),
        (["--target", "2048x"], "reaches 512x"),
    ],
)
def test_refusals_are_one_line(finished, arguments, changes, message):
    out, _ = finished
    done = run(*arguments, "--out", out, *changes, code=2)
    (line,) = done.stderr.strip().splitlines()
    assert message in line
