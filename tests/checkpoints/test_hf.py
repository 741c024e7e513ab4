"""Directories for engines: what plain transformers computes from them, and what is refused."""

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import FAMILIES, pair
from kills import killed_at
from longrope.checkpoints.export import ExportOptions, export
from longrope.checkpoints.fold import why_not_foldable
from longrope.execution import ExecutionConfig
from longrope.files.atomic import recover
from longrope.inference.load import load_extended
from longrope.models.info import inspect_model
from longrope.models.load import load_model
from longrope.rope.apply import rescaled
from longrope.rope.pair import RescalePair
from longrope.rope.rescale import Rescale, default_attention_factor


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
    # Its own factors fit the weights; others would count the folded factor twice.
    again = load_extended(str(tmp_path / "out"), ExecutionConfig(dtype="float32"))
    with rescaled(again[0].model, again[1].long):
        again_found = logits(again[0].model, ids[:, :81])
    torch.testing.assert_close(again_found, found, atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="give the model that it was exported from"):
        inspect_model(str(tmp_path / "out"), rope_scaling="replace").require_extendable()
    for factors in ({}, files(made, tmp_path)):
        with pytest.raises(ValueError, match="give the model that it was exported from"):
            export(ExportOptions(str(tmp_path / "out"), tmp_path / "again", **factors))


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


YARN = {"long_factors": "yarn", "target": "512"}
EXPORTED = ["README.md", "config.json", "generation_config.json", "longrope.json"]
EXPORTED += ["model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def source(checkpoints, tmp_path):
    """A copy of a checkpoint that a test may change."""
    return shutil.copytree(checkpoints("llama"), tmp_path / "source")


def change(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def names(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.mark.parametrize("linked", [False, True])
def test_writing_into_an_export_leaves_the_model_alone(linked, source, tmp_path):
    """And the reverse; unless hard links were asked for."""
    export(ExportOptions(str(source), tmp_path / "out", hard_links=linked, **YARN))
    for name in ("model.safetensors", "tokenizer.json"):
        before = (source / name).read_bytes()
        assert (tmp_path / "out" / name).read_bytes() == before
        with (tmp_path / "out" / name).open("r+b") as file:
            file.write(b"changed!")
        weights = name == "model.safetensors"
        assert ((source / name).read_bytes() == before) == (not (linked and weights))


def test_hard_links_are_refused_where_weights_are_written_anew(source, tmp_path):
    for options in ({"format": "gguf"}, {"fold_attention_factor": True}):
        out = tmp_path / ("out.gguf" if "format" in options else "out")
        with pytest.raises(ValueError, match="hard_links=True does not apply"):
            export(ExportOptions(str(source), out, hard_links=True, **YARN, **options))


def test_only_what_belongs_goes_into_an_export(source, micro_models, ids, tmp_path):
    """Another index, other weights, records of a training, notes, code that nothing names."""
    stray = ["model.safetensors.index.json", "pytorch_model.bin.index.json", "params.json"]
    stray += ["trainer_state.json", "all_results.json", "notes.txt"]
    stray += ["modeling_other.py", "pytorch_model.bin", "consolidated.safetensors", "id_rsa"]
    for name in stray:
        (source / name).write_text('{"weight_map": {"x": "gone.safetensors"}}')
    (source / "LICENSE.txt").write_text("as is")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    export(ExportOptions(str(source), tmp_path / "out", **YARN))
    belongs = [*EXPORTED, "LICENSE.txt", "chat_template.jinja"]
    assert names(tmp_path / "out") == sorted(belongs)
    change(source / "config.json", auto_map={"AutoConfig": "modeling_other.Config"})
    export(ExportOptions(str(source), tmp_path / "out", force=True, **YARN))
    assert names(tmp_path / "out") == sorted([*belongs, "modeling_other.py"])


def test_scaling_that_only_other_engines_apply_is_dropped(source, tmp_path):
    strange = {"dual_chunk_attention_config": {"chunk_size": 16}, "use_dynamic_ntk": True}
    change(source / "config.json", **strange, use_logn_attn=True, bos_token_id=7)
    export(ExportOptions(str(source), tmp_path / "out", **YARN))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {*strange, "use_logn_attn"} & set(config)
    assert config["bos_token_id"] == 7


def numbers(content, number, path=""):
    """Where a JSON value holds a number."""
    if isinstance(content, dict | list):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        return [p for key, value in items for p in numbers(value, number, f"{path}.{key}")]
    return [path] if content == number and type(content) is int else []


@pytest.mark.parametrize("family", ["llama", "gemma3_whole", "mistral3"])
def test_no_place_keeps_the_old_length(family, checkpoints, tmp_path):
    """All numbers equal to the old length in an export, and why each stays."""
    old, source = 80, shutil.copytree(checkpoints(family), tmp_path / "source")
    nested = family != "llama"
    config = json.loads((source / "config.json").read_text())
    text = config["text_config"] if nested else config
    text |= {"max_position_embeddings": old, "max_length": old, "seq_length": old}
    text |= {"sliding_window": old if nested else None, "some_list": [{"max_seq_len": old}]}
    if nested:
        config |= {"max_position_embeddings": old, "model_max_length": old}
        config["vision_config"]["max_position_embeddings"] = old
    (source / "config.json").write_text(json.dumps(config))
    lengths = {"max_length": old, "max_new_tokens": old}
    (source / "generation_config.json").write_text(json.dumps(lengths))
    change(source / "tokenizer_config.json", model_max_length=old, max_length=old)
    cut = {"max_length": old, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    change(source / "tokenizer.json", truncation=cut)
    export(ExportOptions(str(source), tmp_path / "out", **YARN))
    found = {
        f"{file.name}{path}"
        for file in (tmp_path / "out").glob("*.json")
        for path in numbers(json.loads(file.read_text()), old)
        if not path.startswith(".model.")  # the ids of tokens
    }
    inside, original = ".text_config" if nested else "", "original_max_position_embeddings"
    full = "full_attention." if "gemma3" in family else ""
    scaled = [f"rope_parameters.{full}", "rope_scaling."]
    kept = {"generation_config.json.max_new_tokens"}  # of what is generated, not of a context
    kept |= {f"longrope.json.{which}.{original}" for which in ("long", "short")}
    kept |= {"longrope.json.short.max_position_embeddings"}
    kept |= {f"config.json{inside}.{where}{original}" for where in ("", *scaled)}
    if nested:
        kept |= {"config.json.text_config.sliding_window"}
        kept |= {"config.json.vision_config.max_position_embeddings"}
    assert found == kept
    out = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert out["max_length"] == 512


@pytest.mark.slow
def test_plain_generate_takes_a_long_prompt(source, tmp_path):
    (source / "generation_config.json").write_text('{"max_length": 64, "eos_token_id": null}')
    export(ExportOptions(str(source), tmp_path / "out", **YARN))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.generate(torch.full((1, 100), 5)).shape[1] == 512


def test_the_config_says_what_the_weights_decide(source, micro_models, ids, tmp_path):
    """Engines that believe ``tie_word_embeddings`` would drop the trained head."""
    made, model = pair(micro_models("llama")), micro_models("llama")
    change(source / "config.json", tie_word_embeddings=True)
    named = files(made, tmp_path)
    export(ExportOptions(str(source), tmp_path / "out", **named))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with rescaled(model, made.long):
        torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=2e-3, rtol=1e-3)
    tensors = load_file(source / "model.safetensors")
    for head in ("equal", "none"):
        tensors.pop("lm_head.weight")
        if head == "equal":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        export(ExportOptions(str(source), tmp_path / head, **named))
        config = json.loads((tmp_path / head / "config.json").read_text())
        assert config["tie_word_embeddings"] is True


def test_an_export_has_the_same_bytes_everywhere(source, tmp_path):
    """Whatever the tokenizer was saved under, and wherever the model lies."""
    said = {"local_files_only": True, "is_local": True, "name_or_path": "/home/me/model"}
    said |= {"tokenizer_file": "/home/me/tokenizer.json", "token": "hf_secret"}
    other = shutil.copytree(source, tmp_path / "elsewhere" / "source")
    change(other / "tokenizer_config.json", **said)
    for place, out in ((source, "one"), (other, "two")):
        export(ExportOptions(str(place), tmp_path / out, **YARN))
    assert names(tmp_path / "one") == EXPORTED
    for name in EXPORTED:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("offline", ["0", "1"])
def test_saving_a_loaded_model_writes_nothing_of_the_environment(
    offline, checkpoints, tmp_path, monkeypatch
):
    from huggingface_hub import constants

    from longrope.checkpoints.hf import export_model
    from longrope.checkpoints.manifest import Manifest

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline == "1")
    loaded = load_model(str(checkpoints("llama")))
    export_model(loaded, Manifest("hf", "name", pair(loaded.model)), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert set(found) == {
        *("backend", "bos_token", "eos_token", "pad_token"),
        *("model_max_length", "tokenizer_class"),
    }


@pytest.mark.parametrize("mounted", [False, True])
def test_force_keeps_the_old_export_until_the_new_one_stands(
    mounted, source, tmp_path, monkeypatch
):
    """On a full disk, in a directory that cannot be renamed, and through a link."""
    disk, link = tmp_path / "disk", tmp_path / "link"
    link.symlink_to(disk)
    if mounted:
        (disk / "lost+found").mkdir(parents=True)
        rename = os.rename

        def refuse(one, two):
            if str(disk) in (str(one), str(two)):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            rename(one, two)

        monkeypatch.setattr(os, "rename", refuse)
    export(ExportOptions(str(source), disk, force=mounted, **YARN))
    before = {name: (disk / name).read_bytes() for name in EXPORTED}

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    static = ExportOptions(str(source), link, "hf-static", force=True, **YARN)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match=r"cannot be written \(No space"):
            export(static)
    assert {name: (disk / name).read_bytes() for name in EXPORTED} == before
    export(static)
    assert link.is_symlink()
    assert json.loads((disk / "longrope.json").read_text())["format"] == "hf-static"
    assert names(disk) == sorted([*EXPORTED, *(["lost+found"] if mounted else [])])
    assert sorted(os.listdir(tmp_path)) == ["disk", "link", "source"]


@pytest.mark.parametrize("suffix", ["", ".gguf"])
@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_write_leaves_nothing_that_blocks_or_stays(suffix, every, source, tmp_path):
    """A new export is resumed by the same command; with force, the old one or the new stands."""
    place = tmp_path / "place"
    options = ExportOptions(str(source), place / f"out{suffix}", f"{suffix[1:] or 'hf'}", **YARN)
    again = ExportOptions(**vars(options) | {"force": True, "format": f"{options.format}-static"})
    export(options)
    whole = names(place)

    def content():  # of a GGUF file, the card is written after it
        kept = [name for name in whole if (place / name).is_file() and name != "out.md"]
        return {name: (place / name).read_bytes() for name in kept}

    old = content()
    export(again)
    new = content()
    steps = 0
    while True:
        shutil.rmtree(place)
        if not killed_at(steps, lambda: export(options)):
            break
        if not options.out.exists():
            export(options)
        recover(options.out)
        assert content() == old
        export(ExportOptions(**vars(options) | {"force": True}))
        assert (names(place), content()) == (whole, old)
        if killed_at(steps, lambda: export(again)):
            recover(options.out)
            assert content() in (old, new)
        export(again)
        assert (names(place), content()) == (whole, new)
        steps += every
    assert steps > (20 if not suffix else 8)


def test_a_kill_while_a_gguf_file_is_dequantised_leaves_nothing(source, tmp_path):
    """Its weights are written as safetensors first: all of them once more."""
    place = tmp_path / "place"
    export(ExportOptions(str(source), tmp_path / "model.gguf", "gguf", **YARN))
    asked = {"rope_scaling": "replace", "original_length": 64, "dtype": "float32"} | YARN
    options = ExportOptions(str(tmp_path / "model.gguf"), place / "out", **asked)
    left = []
    for steps in range(4, 16, 3):
        assert killed_at(steps, lambda: export(options))
        left += [name for name in os.listdir(place) if name.startswith(".out.scratch")]
    assert len(left) > 1
    export(options)
    assert os.listdir(place) == ["out"]
