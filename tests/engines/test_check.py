"""``longrope verify``: engines that apply the factors pass, engines that drop them do not."""

import dataclasses
import json
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import program
from longrope.checkpoints.export import ExportOptions, export
from longrope.checkpoints.manifest import Manifest
from longrope.data.stdlib import library_texts
from longrope.engines.check import Reference, verify
from longrope.models.bundled import BUNDLED
from longrope.models.load import load_tokenizer
from longrope.rope.rescale import Rescale


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export")
    shared = {"rope_theta": 1e4, "original_max_position_embeddings": 256, "attention_factor": 1.3}
    Rescale(tuple(np.linspace(1, 1.5, 32)), max_position_embeddings=512, **shared).save(
        directory / "short.json"
    )
    Rescale(tuple(np.geomspace(1, 60, 32)), max_position_embeddings=16384, **shared).save(
        directory / "long.json"
    )
    named = {
        "long_factors": str(directory / "long.json"),
        "short_factors": str(directory / "short.json"),
    }
    export(ExportOptions("bundled", directory / "hf", **named))
    return directory / "hf"


def wrapper(path, change):
    """A Python for ``--engine-python`` that changes the question before the engine reads it."""
    path.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nfile = sys.argv[3]\n"
        f"q = json.load(open(file))\n{change}\njson.dump(q, open(file, 'w'))\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
    )
    path.chmod(0o755)
    return path


def test_transformers_switches_at_the_boundary(exported):
    verdict = verify(Reference(str(exported)), "transformers", prompts=1)
    assert [(line.length, line.applied) for line in verdict.lines] == [
        (384, "short"),
        (512, "short"),
        (513, "long"),
        (2048, "long"),
    ]
    assert verdict.right
    assert max(line.largest for line in verdict.lines) < 1e-3
    for line in verdict.lines:
        others = {name: d for name, d in line.distances.items() if name != line.intended}
        assert min(others.values()) > 0.3


def test_an_engine_that_drops_the_factors_is_found_out(exported, tmp_path):
    """transformers itself, given the unscaled model in place of the export: exit code 1."""
    python = wrapper(tmp_path / "python", f"q['path'] = {str(BUNDLED)!r}")
    ended = program.run(
        "verify", exported, "--engine-python", python, "--lengths", "400,1k", "--json"
    )
    assert ended.returncode == 1, ended.stderr
    verdict = json.loads(ended.stdout)
    assert not verdict["right"]
    assert [line["applied"] for line in verdict["lines"]] == ["none", "none"]
    assert [line["intended"] for line in verdict["lines"]] == ["short", "long"]
    assert min(line["largest"] for line in verdict["lines"]) > 0.3


@pytest.mark.slow
def test_an_engine_that_computes_something_else_is_unclear(exported, tmp_path):
    """Neither set: half of the prompt is missing."""
    change = "q['prompts'] = [ids[len(ids) // 2:] for ids in q['prompts']]"
    python = wrapper(tmp_path / "python", change)
    verdict = verify(
        Reference(str(exported)), "transformers", engine_python=str(python), lengths=(1024,)
    )
    assert verdict.lines[0].applied == "unclear"
    assert not verdict.right


def test_weights_that_an_export_lost_show_against_the_source(exported, tmp_path):
    """A head of other rows: the export agrees with itself, and not with its source."""
    named = {f"{n}_factors": str(exported.parent / f"{n}.json") for n in ("long", "short")}
    out = tmp_path / "out"
    export(ExportOptions("bundled", out, fold_attention_factor=True, **named))
    text = "".join(library_texts(held_out=True).values())[:20_000]
    ids = load_tokenizer("bundled")(text, verbose=False)["input_ids"]

    def judged(reference):
        """The engine is transformers, in this process."""
        model, lines = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), []
        for length in (400, 600):
            with torch.no_grad():
                logits = model(torch.tensor([ids[:length]])).logits[0, -1]
            top = logits.double().log_softmax(-1).topk(20)
            answer = dict(zip(map(str, top.indices.tolist()), top.values.tolist(), strict=True))
            lines.append(reference.line(length, None, [ids[:length]], [answer]))
        return [line.applied for line in lines], max(line.largest for line in lines)

    for reference in (Reference(str(out)), Reference(str(out), source="bundled")):
        applied, largest = judged(reference)
        assert applied == ["short", "long"] and largest < 0.02  # folded in bfloat16
    tensors = load_file(out / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert judged(Reference(str(out)))[0] == ["short", "long"]
    applied, largest = judged(Reference(str(out), source="bundled"))
    assert applied == ["unclear", "unclear"] and largest > 1


def test_mistakes_are_one_line(exported, tmp_path):
    legacy = ["verify", exported, "--engine", "transformers-legacy"]
    mistakes = (
        (["verify", exported, "--engine", "ollama"], "--engine is 'ollama'"),
        (["verify", exported, "--engine", "vllm"], "--engine vllm .*installed.*--engine-python"),
        (["verify", exported, "--engine", "llamacpp"], "--engine llamacpp .*GGUF"),
        (["verify", tmp_path / "no"], "/no: no such"),
        (["verify", BUNDLED], "not scaled"),
        (
            ["verify", exported, "--engine-python", "/no/python"],
            "--engine-python /no/python .*started",
        ),
        (
            [*legacy, "--engine-python", sys.executable, "--lengths", "64"],
            "requires transformers 4",
        ),
        (["export", "bundled", "--out", tmp_path / "x"], "--long-factors is missing"),
        (
            ["export", "bundled", "--out", tmp_path / "x", "--long-factors", "yarn"],
            "--target is missing",
        ),
        (
            ["export", "bundled", "--out", exported, "--long-factors", "yarn"],
            "--out.*--force",
        ),
        (["export", "bundled", "--out", tmp_path / "x", "--format", "onnx"], "--format is 'onnx'"),
        (
            ["export", "bundled", "--out", tmp_path / "x", "--format", "gguf"],
            r"--out is .*x; .*\.gguf",
        ),
        (
            ["export", "bundled", "--out", tmp_path / "x.gguf", "--format", "gguf", "--hard-links"],
            "--hard-links does not apply to GGUF",
        ),
        (["verify", exported, "--source", tmp_path / "no"], "/no: no such"),
        (["verify", exported, "--prompts", "0"], "--prompts is 0"),
        (["verify", exported, "--dtype", "auto"], "'--dtype'"),
        (["import", BUNDLED, "--out", tmp_path / "x"], "not scaled"),
    )
    lines = program.each_refused(*(arguments for arguments, _ in mistakes))
    for line, (_, said) in zip(lines, mistakes, strict=True):
        assert re.search(said, line), line
    assert not (tmp_path / "x").exists()


def test_import_writes_what_was_exported(exported, tmp_path):
    program.succeeds("import", exported, "--out", tmp_path)
    for name, theirs in (("rescale", "long"), ("short", "short")):
        assert Rescale.load(tmp_path / f"{name}.json") == Rescale.load(
            exported.parent / f"{theirs}.json"
        )
    program.refused("import", exported, "--out", tmp_path)


@pytest.mark.slow
def test_transformers_is_asked_with_a_class_that_knows_the_model(checkpoints, tmp_path):
    """Mistral's models for pictures are no causal ones to it."""
    asked = {"long_factors": "yarn", "target": "512"}
    export(ExportOptions(str(checkpoints("mistral3")), tmp_path / "out", **asked))
    verdict = verify(Reference(str(tmp_path / "out")), "transformers", lengths=(60, 70), prompts=1)
    assert verdict.right


def test_a_verdict_is_plain_data(exported):
    verdict = verify(Reference(str(exported)), "transformers", lengths=(64,), prompts=1)
    assert json.loads(json.dumps(dataclasses.asdict(verdict)))["lines"][0]["length"] == 64


@pytest.mark.parametrize("file", ["config.json", "longrope.json"])
@pytest.mark.parametrize("change", ["factors", "attention factor", "length"])
def test_an_export_that_was_changed_is_refused(exported, tmp_path, file, change):
    changed = tmp_path / "changed"
    shutil.copytree(exported, changed)
    content = json.loads((changed / file).read_text())
    config = file == "config.json"
    scaling = content["rope_parameters"] if config else content["long"]
    if change == "factors":
        scaling["long_factor" if config else "factors"][5] *= 1.01
    elif change == "attention factor":
        scaling["attention_factor"] = 1.0
    else:
        (content if config else scaling)["max_position_embeddings"] = 8192
    (changed / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"changed after the export"):
        Reference(str(changed))


def test_a_card_without_a_switch_names_one_set_of_factors(exported, tmp_path):
    long = str(exported.parent / "long.json")
    export(ExportOptions("bundled", tmp_path / "one", long_factors=long))
    one, two = ((d / "README.md").read_text() for d in (tmp_path / "one", exported))
    assert "Short factors are for" in two
    assert "Short factors" not in one
    assert [line[:8] for line in one.splitlines() if line.startswith(("- long:", "- short:"))] == [
        "- long: "
    ]


def test_exporting_a_search_names_the_command_for_its_factors(tmp_path):
    search, factors = tmp_path / "a search", {"original_max_position_embeddings": 256}
    search.mkdir()
    rescale = Rescale(
        (2.0,) * 32,
        rope_theta=1e4,
        max_position_embeddings=512,
        provenance={"model": "bundled"},
        **factors,
    )
    rescale.save(search / "portable.json")
    line = program.refused("export", search, "--out", tmp_path / "x")
    words = shlex.split(line[line.index("longrope export") :])
    program.succeeds(*words[1:])
    assert Manifest.load(tmp_path / "exported").pair.long.factors == rescale.factors
