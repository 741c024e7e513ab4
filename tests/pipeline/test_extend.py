"""The whole system on a model of two layers: every stage, and what it leaves."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from longrope.distributed import Ranks
from longrope.execution import ExecutionConfig
from longrope.pipeline.extend import _finetune, open_run
from longrope.pipeline.recipe import load_recipe, make_recipe
from longrope.rope.rescale import Rescale
from program import refused, succeeds
from whole_run import RECIPE, STAGES, evaluated, run


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
            assert row["standard_error"] > 0  # of one document: over blocks of it
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
    exported, final, tuned = (
        load_file(out / name / "model.safetensors")
        for name in ("model", "final-finetune/model", "finetune/model")
    )
    for name, weight in exported.items():
        assert weight.equal(final[name])
    assert any(not weight.equal(tuned[name]) for name, weight in final.items())


def test_every_training_is_under_the_factors_and_on_the_pieces_for_it(finished, monkeypatch):
    out, _ = finished
    opened = open_run(load_recipe(out / "recipe.yaml"), out, Ranks())
    given = {}

    def kept(loaded, rescale, short, pieces, settings, directory, *_, **__):
        given[directory.name] = rescale, pieces
        return [{"loss": 1.0}]

    monkeypatch.setattr("longrope.pipeline.extend.finetune", kept)
    for name in ("finetune", "final-finetune"):
        _finetune(opened, opened.plan[name])
    rescale, pieces = given["finetune"]
    assert rescale == Rescale.load(out / "search" / "rescale.json")
    assert "rotary_positions" not in pieces[0]
    final, jumping = given["final-finetune"]
    assert final == Rescale.load(out / "second-search" / "rescale.json")
    assert final.max_position_embeddings == 1024
    assert jumping.reach == 1280  # so that the target is not the edge of what is seen
    assert max(int(jumping[i]["rotary_positions"].max()) for i in range(8)) > 300
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
    from longrope.inference.load import load_extended
    from longrope.rope.apply import rescaled

    out, _ = finished
    plain = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    loaded, pair = load_extended(str(out), ExecutionConfig(dtype="float32"))
    assert loaded.info.original_max_position_embeddings == 64  # not the recovery length
    ids = torch.randint(3, 1500, (1, 600), generator=torch.Generator().manual_seed(0))
    for tokens in (50, pair.recovery_length, pair.recovery_length + 1, 600):
        rescale = pair.choose(tokens)
        exported = rescale.replace(attention_factor=pair.long.attention_factor)
        with torch.no_grad(), rescaled(loaded.model, exported):
            expected = loaded.model(input_ids=ids[:, :tokens]).logits
        with torch.no_grad():
            found = plain(input_ids=ids[:, :tokens]).logits
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


def test_the_card_tells_of_the_factors_that_are_exported(finished, tmp_path):
    out, _ = finished
    rows = json.loads((out / "results.json").read_text())["perplexity"]
    found = {(r["method"], r["length"]): f"| {r['perplexity']:.2f} |" for r in rows}

    def card(name, *options):
        run(out, "--out", tmp_path / name, *options, verb="export")
        return (tmp_path / name / "README.md").read_text()

    assert f"| 64 {found['longrope', 64]}" in card("hf")
    assert f"| 64 {found['longrope without recovery', 64]}" in card(
        "static", "--format", "hf-static"
    )
    assert "perplexity" not in card("other", "--long-factors", "yarn", "--target", "1024")


def test_what_is_published_names_no_folder(finished):
    out, _ = finished
    files = [p for p in (out / "model").iterdir() if p.suffix in (".json", ".md", ".txt")]
    assert {"config.json", "longrope.json", "README.md"} <= {p.name for p in files}
    model = Path(load_recipe(str(out / "recipe.yaml")).model)
    for path in files:
        assert str(model.parent) not in path.read_text(), path
        assert str(out.parent) not in path.read_text(), path
    assert Rescale.load(out / "search" / "rescale.json").provenance["model"] == model.name


def test_a_run_takes_no_factors_of_a_method(finished):
    out, _ = finished
    for name, value in (("--target", "8x"), ("--attention-factor", 0.0)):
        line = refused("evaluate", "passkey", out, "--lengths", "64", name, value)
        assert f"{name} is {value}," in line
        assert f" {out} " in line
        assert "--rescale" in line


def test_the_readme_goes_on_from_a_run(finished, tmp_path):
    """Its command that generates, and its code that loads the result."""
    out, _ = finished
    readme = (Path(__file__).parents[2] / "README.md").read_text().replace("runs/demo", str(out))
    (line,) = [line for line in readme.splitlines() if line.startswith("longrope generate")]
    (tmp_path / "long.py").write_text("import os\n" * 60)
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if str(out) in c]
    verb = shlex.split(line)[1:]
    assert succeeds(*verb, "--max-new-tokens", 5, cwd=tmp_path).strip()
    assert succeeds(code=code, cwd=tmp_path).startswith("import os")


def test_other_weights_under_the_same_name_are_no_resumption(checkpoints, texts, tmp_path):
    """The rest of the run was made with those that were there before."""
    path, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(checkpoints("llama"), path)
    recipe = make_recipe({"model": str(path), "target": "2x", "data": [str(texts)]})
    for _ in range(2):  # as it was it goes on
        open_run(recipe, out, Ranks()).original()
    changed = {name: 1.1 * weight for name, weight in load_file(path / "model.safetensors").items()}
    save_file(changed, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights or the config of .* have changed"):
        open_run(recipe, out, Ranks()).original()


def test_a_short_attention_factor_is_applied_by_longrope_alone(finished, tmp_path, caplog):
    from longrope.checkpoints.run_directory import save_short_attention_factor
    from longrope.inference.load import load_extended

    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    short = Rescale.load(out / "short.json")
    save_short_attention_factor(out, 1.03125)
    _, pair = load_extended(str(out))
    assert "attention factor is 1.031," in caplog.text
    assert pair.short == short.replace(attention_factor=1.03125)
    assert pair.long == Rescale.load(out / "rescale.json")
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["rope_parameters"]["attention_factor"] == pair.long.attention_factor


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_the_teacher_is_the_model_as_it_came(checkpoints, texts, tmp_path, kind):
    """Also where its scaling is replaced in what is trained."""
    scaling = {"rope_theta": 1e4, "rope_type": kind, "factor": 4.0}
    scaling |= {"original_max_position_embeddings": 16} if kind == "yarn" else {}
    path = tmp_path / "model"
    shutil.copytree(checkpoints("llama"), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rope_parameters": scaling}))
    recipe = make_recipe({"model": str(path), "target": "2x", "rope_scaling": "replace"})
    opened = open_run(recipe, tmp_path / "out", Ranks())
    length = opened.plan.original
    ids = torch.randint(3, 1500, (1, length), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        torch.testing.assert_close(opened.teacher().model(input_ids=ids).logits, expected)
        other = opened.original().model(input_ids=ids).logits
    assert ((other - expected).abs().max() > 0.01) == (kind == "yarn")


def test_start_tokens_stay_with_our_own_runtime(arguments, tmp_path, checkpoints, texts):
    """Trained and searched with n̂; the checkpoint, which cannot say it, is warned of."""
    recipe = RECIPE | {"model": str(checkpoints("llama")), "data": [str(texts)]}
    recipe |= {"target": "4x", "start_tokens": 4}
    recipe["evaluate"] = {"documents": 1, "methods": []}
    file, out = tmp_path / "r.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(recipe))
    done = run("--recipe", file, "--out", out)
    assert "start_tokens is 4 in rescale.json" in done.stderr
    assert Rescale.load(out / "rescale.json").start_tokens == 4
    config = json.loads((out / "model" / "config.json").read_text())
    long = Rescale.load(out / "rescale.json")
    assert config["rope_parameters"]["long_factor"] == list(long.factors)
    results = json.loads((out / "results.json").read_text())
    measured = {row["length"] for row in results["perplexity"] if row["method"] == "none"}
    assert measured == {row["length"] for row in results["recovery"]}
    assert max(measured) < results["target"]


def test_a_run_s_weights_under_another_rescale(finished, texts):
    """A run is a model too: its weights, as if they were not scaled, at its original length."""
    out, _ = finished
    asked = ["--lengths", "128,512", "--data", texts, "--json", "--target", "8x"]
    run_s = evaluated("perplexity", out, *asked, "--rescale", "yarn")["perplexity"]
    told = ["--rope-scaling", "replace", "--original-length", 64]
    model_s = evaluated("perplexity", out / "model", *asked, "--rescale", "yarn", *told)[
        "perplexity"
    ]
    assert run_s == model_s
    plain = evaluated("perplexity", out, *asked[:4], "--json")["perplexity"]
    assert plain[1]["perplexity"] != run_s[1]["perplexity"]


def test_no_export_takes_the_place_of_a_run_s_model(finished, checkpoints):
    out, _ = finished
    before = (out / "model" / "model.safetensors").read_bytes()
    asked = ["--long-factors", "yarn", "--target", "1024", "--out", out / "model", "--force"]
    line = refused("export", checkpoints("llama"), *asked)
    assert f"--out is {out / 'model'}," in line
    assert "to a run" in line
    assert (out / "model" / "model.safetensors").read_bytes() == before


def test_a_refused_run_claims_nothing(arguments, tmp_path):
    out = tmp_path / "out"
    for name in ("short.txt", "other.txt"):  # the second is no other run than the first
        (tmp_path / name).write_text("too short")
        line = refused("extend", *arguments, "--data", tmp_path / name, "--out", out)
        assert "few tokens" in line
    assert not out.exists()


def test_json_is_all_that_is_printed(finished, arguments):
    out, _ = finished
    assert json.loads(run(*arguments, "--out", out, "--json").stdout)["target"] == 1024
    priced = json.loads(run(*arguments, "--json", verb="plan").stdout)
    assert [stage["name"] for stage in priced["stages"]] == STAGES
