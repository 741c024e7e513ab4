"""Advice: the way that suits each scale, the text it takes, and commands that can be pasted."""

import dataclasses
import json
import shlex

import pytest

from longrope.models.info import inspect_model
from longrope.pipeline.advice import advise_model, advise_target
from pipeline.test_effort import chosen
from pipeline.test_plan import info, make_plan
from program import run, succeeds

assert info is not None  # a fixture


@pytest.mark.parametrize(
    ("target", "way"),
    [("2x", "YaRN suffices"), ("8x", "nothing is trained"), ("16x", "the model is trained")],
)
def test_each_scale_has_its_way(info, target, way):
    _, recipe = chosen(info, target=target)
    said = advise_target(recipe, make_plan(info, recipe, on_cpu=True))
    assert way in said[0]


def test_text_is_what_search_training_and_evaluation_take(info):
    content = {"finetune": {"steps": 10, "batch": 2, "passkey_share": 0.5, "final": {"steps": 5}}}
    content |= {"search": {"windows": 3}, "evaluate": {"documents": 2}}
    _, recipe = chosen(info, target="64x", **content)
    (_, text) = advise_target(recipe, make_plan(info, recipe, on_cpu=True))
    target, trained = 16_384, 2_048
    assert f"at least {2 * target + trained:,} tokens" in text
    better = 3 * target + 2 * target + 15 * 2 * trained // 2
    assert f"better {better:,} (" in text
    _, recipe = chosen(info, target="64x", eval_data=["held-out/"], **content)
    (_, text) = advise_target(recipe, make_plan(info, recipe, on_cpu=True))
    assert f"at least {target + trained:,} tokens" in text


def test_a_model_that_cannot_be_extended_gets_no_advice(info):

    assert advise_model(info)
    assert advise_model(dataclasses.replace(info, extendable=False)) == []


@pytest.mark.slow
def test_the_commands_of_inspect_run(tmp_path):
    commands = [line for line in advise_model(inspect_model("bundled")) if line.startswith("  ")]
    export, search, plan = [shlex.split(line)[1:] for line in commands]
    succeeds(*export, cwd=tmp_path)
    assert (tmp_path / "yarn-model" / "config.json").exists()
    for words, options in (
        (search, ["--budget", "4", "--windows", "1", "--transfer", "none"]),
        (plan, []),
    ):
        words[words.index("TEXT")] = "python-library"
        succeeds(*words, *options, cwd=tmp_path)


@pytest.mark.slow
def test_plan_ends_with_the_command_that_does_it(texts, tmp_path):
    asked = ["bundled", "--target", "16x", "--data", texts, "--effort", "quick"]
    done = run("plan", *asked, "--gpus", "1x80GB", "--set", "finetune.steps=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("Next: ")]
    words = shlex.split(line.removeprefix("Next: "))
    out = ["--out", "runs/bundled-16x"]
    assert words == ["longrope", "extend", *map(str, asked), "--set", "finetune.steps=5", *out]
    printed = json.loads(succeeds("plan", *asked, "--json", cwd=tmp_path))
    settings = {choice["key"]: choice for choice in printed["settings"]}
    assert settings["second_search.method"]["value"] == "yarn"
    assert all(choice["reason"] for choice in settings.values())
