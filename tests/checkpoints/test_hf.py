"""Directories for engines: what plain transformers computes from them, and what is refused."""

import json
import shutil
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import FAMILIES, pair
from longrope.checkpoints.export import ExportOptions, export
from longrope.checkpoints.fold import why_not_foldable
from longrope.models.info import inspect_model
from longrope.rope.apply import rescaled
from longrope.rope.pair import RescalePair
from longrope.rope.rescale import Rescale, default_attention_factor
from program import run


def files(made, where):
    where.mkdir(exist_ok=True)
    made.long.save(where / "long.json")
    made.short.save(where / "short.json")
    return {
        "long_factors": str(where / "long.json"),
        "short_factors": str(where / "short.json"),
    }


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids[:1]).logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "stablelm", "mistral", "smollm3"])
def test_a_folded_attention_factor_gives_the_same_logits(
    family, checkpoints, micro_models, ids, tmp_path
):
    """Engines that read no attention_factor compute √(1 + ln s / ln L): the config says it too."""
    made, model = pair(micro_models(family)), micro_models(family)
    manifest = export(
        ExportOptions(
            str(checkpoints(family)),
            tmp_path / "out",
            fold_attention_factor=True,
            **files(made, tmp_path),
        )
    )
    theirs = default_attention_factor(80, 512)
    assert manifest.folded == theirs
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_scaling"]["attention_factor"] == theirs != made.long.attention_factor
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for tokens, rescale in ((80, made.short), (81, made.long)):
        with rescaled(model, rescale):
            expected = logits(model, ids[:, :tokens])
        with rescaled(model, rescale.replace(attention_factor=theirs)):
            dropped = logits(model, ids[:, :tokens])
        found = logits(loaded, ids[:, :tokens])
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
        assert (dropped - expected).abs().max() > 20 * (found - expected).abs().max()


@pytest.mark.parametrize(
    ("family", "why"),
    [("qwen3", "normalises queries"), ("olmo2", "normalises"), ("phi3", "q_proj in 0 of 4")],
)
def test_where_it_cannot_be_folded_it_is_said(family, why, checkpoints, micro_models, tmp_path):
    named = files(pair(micro_models(family)), tmp_path)
    options = ExportOptions(
        str(checkpoints(family)), tmp_path / "out", fold_attention_factor=True, **named
    )
    with pytest.raises(ValueError, match=why):
        export(options)
    assert not (tmp_path / "out").exists()


def test_folding_that_changes_the_model_is_refused(
    checkpoints, micro_models, ids, tmp_path, caplog
):
    """Half precision rounds more than is left to fold."""
    source, out = str(tmp_path / "half"), tmp_path / "out"
    shutil.copytree(checkpoints("llama"), source)
    half = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    half.save_pretrained(source)
    model = half.float()
    almost = default_attention_factor(80, 512) * 1.0001
    both = pair(model)
    made = RescalePair(*(r.replace(attention_factor=almost) for r in (both.short, both.long)))
    named = files(made, tmp_path)
    with pytest.raises(ValueError, match=r"fold_attention_factor=True .*rounding"):
        export(ExportOptions(source, out, fold_attention_factor=True, **named))
    assert not out.exists()
    assert export(ExportOptions(source, out, **named)).folded is None
    assert "mlx-lm" in caplog.text
    assert "--fold-attention-factor" in (out / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with rescaled(model, made.long):
        expected = logits(model, ids[:, :81])
    torch.testing.assert_close(logits(loaded, ids[:, :81]), expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaling_that_is_there_is_kept_or_replaced_as_told(
    kind, checkpoints, micro_models, ids, tmp_path
):
    """A known method keeps or replaces the scaling; a rescale file includes it."""
    source = tmp_path / "source"
    shutil.copytree(checkpoints("llama"), source)
    config = json.loads((source / "config.json").read_text())
    scaling = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = 64
    config["rope_parameters"] = scaling
    (source / "config.json").write_text(json.dumps(config))
    asked = {"long_factors": "pi", "target": "512"}
    with pytest.raises(ValueError, match=f"already has '{kind}' scaling: choose"):
        export(ExportOptions(str(source), tmp_path / "out", **asked))
    scaled = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    info = inspect_model(str(source), rope_scaling="keep")
    kept = info.rescale("pi", 512)
    kept.save(tmp_path / "kept.json")
    with rescaled(scaled, kept):
        expected = logits(scaled, ids)
    found = {}
    for name, options in {
        "keep": asked | {"rope_scaling": "keep"},
        "replace": asked | {"rope_scaling": "replace", "original_length": 64},
        "file": {"long_factors": str(tmp_path / "kept.json")},
    }.items():
        export(ExportOptions(str(source), tmp_path / name, **options))
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        found[name] = logits(exported.eval(), ids)
    torch.testing.assert_close(found["keep"], expected, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(found["file"], expected, atol=2e-3, rtol=1e-3)
    model = micro_models("llama")
    with rescaled(model, inspect_model(str(checkpoints("llama"))).rescale("pi", 512)):
        expected = logits(model, ids)
    torch.testing.assert_close(found["replace"], expected, atol=2e-3, rtol=1e-3)
    assert (found["keep"] - expected).abs().max() > 0.1


@pytest.mark.parametrize("fold", [False, True])
def test_the_static_export_has_one_set_and_no_boundary(
    checkpoints, micro_models, ids, tmp_path, fold
):
    made, model = pair(micro_models("llama")), micro_models("llama")
    named = files(made, tmp_path) | {"fold_attention_factor": fold}
    export(ExportOptions(str(checkpoints("llama")), tmp_path / "out", "hf-static", **named))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = 1  # what engines compute without a boundary
    assert config["rope_scaling"]["attention_factor"] == (
        theirs if fold else made.long.attention_factor
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for tokens in (40, 97):
        with rescaled(model, made.long):
            expected = logits(model, ids[:, :tokens])
        torch.testing.assert_close(logits(loaded, ids[:, :tokens]), expected, atol=2e-3, rtol=1e-3)


def test_weights_that_stay_as_they_are_are_not_read(checkpoints, micro_models, tmp_path):
    """140 GB of them would be linked: these are no weights at all, and the export does not see."""
    source = tmp_path / "model"
    source.mkdir()
    for file in checkpoints("llama").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "model.safetensors").write_bytes(b"not weights")
    made = pair(micro_models("llama"))
    standard = default_attention_factor(80, 512)
    named = files(
        type(made)(
            made.short.replace(attention_factor=standard),
            made.long.replace(attention_factor=standard),
        ),
        tmp_path,
    )
    assert export(ExportOptions(str(source), tmp_path / "out", **named)).folded is None
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"not weights"


def test_shards_are_folded_each_and_other_forms_left_behind(
    checkpoints, micro_models, ids, tmp_path
):
    """Three shards with their index, and Mistral's second copy of the weights beside them."""
    model, source = micro_models("llama"), tmp_path / "model"
    model.save_pretrained(source, max_shard_size="400KB")
    for file in checkpoints("llama").glob("tokenizer*"):
        (source / file.name).write_bytes(file.read_bytes())
    shards = sorted(file.name for file in source.glob("model-*.safetensors"))
    assert len(shards) >= 3
    (source / "consolidated.safetensors").write_bytes(b"another form")
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    made = pair(model)
    named = files(made, tmp_path) | {"fold_attention_factor": True}
    export(ExportOptions(str(source), tmp_path / "out", **named))
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == shards
    assert not list((tmp_path / "out").glob("*.bin"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with rescaled(model, made.long):
        expected = logits(model, ids)
    torch.testing.assert_close(logits(loaded, ids), expected, atol=2e-3, rtol=1e-3)
    (source / shards[1]).unlink()
    with pytest.raises(ValueError, match=f"{shards[1]}: is missing"):
        export(ExportOptions(str(source), tmp_path / "again", **files(made, tmp_path)))


def test_start_tokens_are_refused_with_what_none_cost(checkpoints, micro_models, tmp_path):
    long = pair(micro_models("llama")).long
    searched = long.replace(start_tokens=8, provenance={"loss": 2.5})
    searched.save(tmp_path / "rescale.json")
    options = {"model": str(checkpoints("llama")), "out": tmp_path / "out"}
    options |= {"long_factors": str(tmp_path / "rescale.json")}
    with pytest.raises(ValueError, match=r"start_tokens is 8 .*drop_start_tokens=True"):
        export(ExportOptions(**options))
    long.replace(provenance={"loss": 2.5106}).save(tmp_path / "portable.json")
    with pytest.raises(ValueError, match=r"portable.json.* \(\+0\.0106 nats"):
        export(ExportOptions(**options))
    manifest = export(ExportOptions(**options, drop_start_tokens=True))
    assert manifest.pair.long == searched.replace(start_tokens=0)


def test_nothing_is_overwritten_unasked(checkpoints, micro_models, tmp_path):
    named = files(pair(micro_models("llama")), tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("dear")
    options = {"model": str(checkpoints("llama")), "out": tmp_path / "out", **named}
    with pytest.raises(ValueError, match=r"`out`.*force=True"):
        export(ExportOptions(**options))
    assert (tmp_path / "out" / "mine").read_text() == "dear"
    with pytest.raises(ValueError, match=r"longrope\.json.*force=True"):
        export(ExportOptions(**options, force=True))
    assert (tmp_path / "out" / "mine").read_text() == "dear"
    (tmp_path / "out" / "mine").unlink()
    export(ExportOptions(**options, force=True))
    export(ExportOptions(**options | {"format": "hf-static"}, force=True))  # over an export's own
    exported = json.loads((tmp_path / "out" / "longrope.json").read_text())
    assert exported["format"] == "hf-static"
    inside = tmp_path / "out" / "inside"
    shutil.copytree(checkpoints("llama"), inside)
    for source in (tmp_path / "out", inside):
        with pytest.raises(ValueError, match=f"contains {source}, .*`out`"):
            export(ExportOptions(**options | {"model": str(source)}, force=True))
    assert (inside / "model.safetensors").exists()


@pytest.mark.parametrize("suffix", ["", ".gguf"])
def test_a_killed_export_leaves_nothing_that_looks_finished(
    suffix, checkpoints, micro_models, tmp_path
):
    """Killed with most of it written: in the last file's sync."""
    named, out = files(pair(micro_models("llama")), tmp_path), tmp_path / f"out{suffix}"
    code = f"""
import os
from pathlib import Path
from longrope.checkpoints.hf import scaled_config
from longrope.checkpoints.export import ExportOptions, export
os.fsync = lambda handle: os.kill(os.getpid(), 9)
export(ExportOptions({str(checkpoints("llama"))!r}, Path({str(out)!r}),
       {"gguf" if suffix else "hf"!r}, **{named!r}))
"""
    assert run(code=code).returncode == -signal.SIGKILL
    assert not out.exists()


def test_sets_that_are_exchanged_are_refused(checkpoints, micro_models, tmp_path):
    named = files(pair(micro_models("llama")), tmp_path)
    exchanged = {
        "long_factors": named["short_factors"],
        "short_factors": named["long_factors"],
    }
    with pytest.raises(ValueError, match=r"long\.json.* 512 .*short\.json.* 80\b"):
        export(ExportOptions(str(checkpoints("llama")), tmp_path / "out", **exchanged))


def test_every_family_says_whether_it_can_be_folded(micro_models):
    foldable = {
        family
        for family in FAMILIES
        if why_not_foldable(list(micro_models(family).state_dict()), 4) is None
    }
    assert {"llama", "mistral", "qwen2", "gemma", "gemma2", "granite", "cohere"} <= foldable
    assert not {"qwen3", "gemma3", "olmo2", "phi3", "gpt_neox"} & foldable


def test_two_stacks_of_as_many_layers_cannot_be_folded():
    """A tower of 32 layers beside a text model of 32, as Qwen2-Audio has: which is which?"""
    names = [
        f"{stack}.layers.{number}.self_attn.{which}_proj.weight"
        for stack in ("audio_tower", "language_model.model")
        for number in range(2)
        for which in "qkvo"
    ]
    assert "audio_tower.layers and language_model" in why_not_foldable(names, 2)
    tower = [name for name in names if name.startswith("audio")]
    assert why_not_foldable(tower, 2) == "only audio_tower.layers has q_proj"
    names.append("language_model.model.layers.2.self_attn.q_proj.weight")
    assert why_not_foldable(names, 3) is None


def test_a_rescale_of_another_shape_is_refused(checkpoints, tmp_path):
    Rescale((1.0, 2.0), 1e4, 64, 512).save(tmp_path / "two.json")
    options = ExportOptions(
        str(checkpoints("llama")), tmp_path / "out", long_factors=str(tmp_path / "two.json")
    )
    with pytest.raises(ValueError, match=r"factors has 2 .* 8 "):
        export(options)
