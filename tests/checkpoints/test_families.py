"""What exports of each family say, and what of a family no checkpoint can say."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from checkpoints.test_hf import files, logits
from conftest import FAMILIES, micro_model, pair
from longrope.checkpoints.export import ExportOptions, export
from longrope.checkpoints.hf import scaled_config
from longrope.checkpoints.importer import import_pair
from longrope.compat import auto_class
from longrope.models.bundled import BUNDLED
from longrope.models.info import inspect_model
from longrope.models.load import load_model
from longrope.rope.apply import rescaled
from longrope.rope.pair import RescalePair
from longrope.rope.rescale import default_attention_factor


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "qwen3",
        "phi3",
        "gemma3",
        "gpt_neox",
        "mixtral",
        "gpt_oss",
        "deepseek_v2",
        "qwen3_5",
        "lfm2",
        "gemma4",
        "gemma3_whole",
        "mistral3",
        "qwen2_5_vl",
    ],
)
def test_transformers_applies_what_was_exported(family, checkpoints, micro_models, ids, tmp_path):
    source, model = checkpoints(family), micro_models(family)
    made = pair(model)
    named = files(made, tmp_path)
    export(ExportOptions(str(source), tmp_path / "out", **named))
    ours, theirs = (place / "model.safetensors" for place in (tmp_path / "out", source))
    assert ours.read_bytes() == theirs.read_bytes()
    auto = auto_class(model.config)
    loaded = auto.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for tokens, rescale in ((80, made.short), (81, made.long)):
        with rescaled(model, rescale):
            expected = logits(model, ids[:, :tokens])
        found = logits(loaded, ids[:, :tokens])
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
        assert (found - logits(model, ids[:, :tokens])).abs().max() > 0.1
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == 512


def test_what_looks_at_pictures_is_not_folded(checkpoints, micro_models, ids, tmp_path):
    """Pixtral's query projections have the names of Mistral's."""
    source, model = checkpoints("mistral3"), micro_models("mistral3")
    made = pair(model)
    named = files(made, tmp_path) | {"fold_attention_factor": True}
    manifest = export(ExportOptions(str(source), tmp_path / "out", **named))
    assert manifest.folded
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    changed = [name for name, weight in before.items() if not torch.equal(after[name], weight)]
    assert any("vision_tower" in name and "q_proj" in name for name in before)
    assert len(changed) == 4 and all("language_model" in name for name in changed)
    loaded = auto_class(model.config).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with rescaled(model, made.long):
        torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=2e-3, rtol=1e-3)


def test_an_export_still_takes_pictures(checkpoints, micro_models, ids, tmp_path):
    """Qwen-VL's positions have three axes, which differ where a picture is."""
    made = pair(micro_models("qwen2_5_vl"))
    named = files(made, tmp_path)
    export(ExportOptions(str(checkpoints("qwen2_5_vl")), tmp_path / "out", **named))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    for number, name in enumerate(("image", "video", "vision_start", "vision_end")):
        setattr(config, f"{name}_token_id", 1400 + number)
    loaded = auto_class(config).from_pretrained(tmp_path / "out", config=config).eval()
    row = ids[:1].clone()
    row[0, 10:16] = torch.tensor([1402, 1400, 1400, 1400, 1400, 1403])
    patches = torch.randn(2, 16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    asked = {"image_grid_thw": torch.tensor([[1, 4, 4]])}
    asked["mm_token_type_ids"] = (row == 1400).long()
    with torch.no_grad():
        one, other = (
            loaded(input_ids=row, pixel_values=each, use_cache=False, **asked).logits
            for each in patches
        )
    assert one.isfinite().all()
    assert (one - other)[:, :11].abs().max() == 0
    assert (one - other)[:, 11:].abs().max() > 0.1


@pytest.fixture
def scaled(tmp_path):
    """A checkpoint of a config with YaRN from 64 to 256 tokens, and its model."""

    def make(config, **scaling):
        config.rope_parameters = {
            **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
            **{"original_max_position_embeddings": 64, **scaling},
        }
        config.max_position_embeddings = 256
        model = micro_model(config)
        model.save_pretrained(tmp_path / "source")
        for file in BUNDLED.glob("tokenizer*"):
            shutil.copy(file, tmp_path / "source")
        return str(tmp_path / "source")

    return make


def test_a_scale_of_all_scores_that_no_checkpoint_can_say_is_refused(scaled, tmp_path):
    source, out = scaled(FAMILIES["deepseek_v3"](), mscale_all_dim=1.0), tmp_path / "out"
    asked = {"long_factors": "yarn", "target": "512"}
    with pytest.raises(ValueError, match=r"mscale_all_dim.*rope_scaling='replace'"):
        export(ExportOptions(source, out, rope_scaling="keep", **asked))
    assert not out.exists()
    export(ExportOptions(source, out, rope_scaling="replace", **asked))
    assert "mscale_all_dim" not in (out / "config.json").read_text()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_scale_that_the_architecture_ignores_is_no_reason(family, scaled, ids, tmp_path):
    """Ministral 3's configs have mscale_all_dim, but only DeepSeek's attention reads it."""
    source = scaled(FAMILIES[family](), mscale=1.0, mscale_all_dim=1.0)
    info = inspect_model(source, rope_scaling="keep")
    asked = {"long_factors": "pi", "target": "512", "rope_scaling": "keep"}
    boundary = info.boundary or info.original_max_position_embeddings
    assert not info.scales_scores and boundary
    export(ExportOptions(source, tmp_path / "out", **asked))
    loaded = load_model(source, rope_scaling="keep")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad(), rescaled(loaded.model, info.rescale("pi", 512)):
        expected = loaded.model(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, expected, atol=1e-3, rtol=1e-3)


def test_factors_searched_with_such_a_scale_are_refused_without(scaled, tmp_path):
    source = scaled(FAMILIES["deepseek_v3"](), mscale_all_dim=1.0)
    info = inspect_model(source, rope_scaling="keep")
    info.rescale("pi", 512).replace(provenance={}).save(tmp_path / "kept.json")
    named = {"long_factors": str(tmp_path / "kept.json"), "rope_scaling": "replace"}
    with pytest.raises(ValueError, match=r"mscale_all_dim.*rope_scaling='replace'"):
        export(ExportOptions(source, tmp_path / "out", **named))


def test_an_export_without_provenance_is_the_same(scaled, tmp_path):
    source = scaled(FAMILIES["llama"]())
    info = inspect_model(source, rope_scaling="keep")
    notes = {"method": "search", "loss": 2.5, "base_factors": [9.0], "documents": ["d"]}
    made = RescalePair(*(info.rescale("pi", n).replace(provenance=notes) for n in (320, 512)))
    written = []
    for kept in (True, False):
        where = tmp_path / str(kept)
        named = files(made, where)
        for file in named.values():
            content = json.loads(Path(file).read_text())
            assert content["base_factors"] == list(info.base_factors)
            if not kept:
                del content["provenance"]
            Path(file).write_text(json.dumps(content))
        export(ExportOptions(source, where / "out", **named))
        found = {file.name: file.read_bytes() for file in (where / "out").iterdir()}
        manifest = json.loads(found.pop("longrope.json"))
        noted = [manifest[name].pop("provenance") for name in ("short", "long")]
        assert noted == [notes if kept else {}] * 2
        written.append((found, manifest))
    assert written[0] == written[1]


def test_scores_that_grow_with_the_position_stay_as_they_are(scaled, ids, tmp_path):
    """Ministral 3 counts positions in what is the boundary in an export."""
    config = transformers.Ministral3Config(
        **FAMILIES["mistral"]().to_diff_dict() | {"head_dim": 16}
    )
    source, out = scaled(config, llama_4_scaling_beta=2.0), tmp_path / "out"
    asked = {"long_factors": "ntk", "target": "512", "rope_scaling": "replace"}
    with pytest.raises(
        ValueError, match=r"original_max_position_embeddings \(64\).*original_length"
    ):
        export(ExportOptions(source, out, original_length=32, **asked))
    unscaled = tmp_path / "unscaled"
    load_model(source, rope_scaling="replace").model.save_pretrained(unscaled)
    assert inspect_model(str(unscaled)).rope_scaling is None
    assert inspect_model(str(unscaled)).boundary == 64
    export(ExportOptions(source, out, **asked))
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    loaded = load_model(source, rope_scaling="replace")
    with rescaled(loaded.model, loaded.info.rescale("ntk", 512)):
        torch.testing.assert_close(
            logits(theirs, ids), logits(loaded.model, ids), atol=2e-3, rtol=1e-3
        )
    theirs.config.rope_parameters["llama_4_scaling_beta"] = 0.0
    assert (logits(theirs, ids) - logits(loaded.model, ids)).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "gemma4"])
def test_importing_an_export_is_the_identity(family, checkpoints, micro_models, tmp_path):
    """Also where dimensions do not turn, whose factors are written as one number."""
    info = inspect_model(str(checkpoints(family)))
    both = (info.rescale(m, n).replace(attention_factor=1.2) for m, n in (("ntk", 64), ("pi", 512)))
    made = RescalePair(*both)
    named = files(made, tmp_path)
    export(ExportOptions(str(checkpoints(family)), tmp_path / "out", **named))
    assert import_pair(str(tmp_path / "out")) == made
    with pytest.raises(ValueError, match="not scaled"):
        import_pair(str(checkpoints(family)))


def test_the_length_is_written_under_the_family_s_own_name(micro_models):
    """Bailing's is model_max_length, which its config reads max_position_embeddings from."""
    known = transformers.BailingHybridConfig()
    found = scaled_config(known.to_dict(), pair(micro_models("llama")), known)
    assert type(known)(**found).max_position_embeddings == 512


def test_version_4_finds_the_factors_of_full_attention(checkpoints, micro_models, tmp_path):
    """benchmarks/architectures_legacy.py compares version 4's logits."""
    made = pair(micro_models("gemma3"))
    named = files(made, tmp_path / "factors")
    export(ExportOptions(str(checkpoints("gemma3")), tmp_path / "out", **named))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_scaling"]["long_factor"] == list(made.long.factors)
    assert config["rope_scaling"]["rope_type"] == "longrope"
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)
    read = transformers.AutoConfig.from_pretrained(tmp_path / "out").rope_parameters
    assert read["full_attention"]["long_factor"] == list(made.long.factors)
    assert (read["sliding_attention"]["rope_type"], read["sliding_attention"]["rope_theta"]) == (
        "default",
        1e4,
    )


def test_phi_3_has_the_three_keys_that_version_4_demands(checkpoints, micro_models, ids, tmp_path):
    """If it computes the same attention factor from them; else it shall refuse the export."""
    model = micro_models("phi3")
    for factor, short in ((default_attention_factor(80, 512), True), (1.1, False)):
        both = pair(model)
        made = RescalePair(*(r.replace(attention_factor=factor) for r in (both.short, both.long)))
        out = tmp_path / f"{factor}"
        export(ExportOptions(str(checkpoints("phi3")), out, **files(made, tmp_path / "factors")))
        found = json.loads((out / "config.json").read_text())["rope_scaling"]
        assert (found.keys() == {"type", "short_factor", "long_factor"}) == short
        assert import_pair(str(out)) == made
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        with rescaled(model, made.long):
            expected = logits(model, ids[:, :81])
        torch.testing.assert_close(logits(loaded, ids[:, :81]), expected, atol=2e-3, rtol=1e-3)


def test_what_version_4_wrote_of_layered_scaling_does_not_stay(
    checkpoints, micro_models, ids, tmp_path
):
    """Gemma 3 from 4B on: its rope_scaling says linear, and would be put over the factors."""
    shutil.copytree(checkpoints("gemma3"), tmp_path / "source")
    file, model = tmp_path / "source" / "config.json", micro_models("gemma3")
    config = json.loads(file.read_text())
    config["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    file.write_text(json.dumps(config))
    made = pair(model)
    named = files(made, tmp_path / "factors") | {"original_length": 64}
    export(ExportOptions(str(tmp_path / "source"), tmp_path / "out", **named))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with rescaled(model, made.long):
        expected = logits(model, ids[:, :81])
    torch.testing.assert_close(logits(loaded, ids[:, :81]), expected, atol=2e-3, rtol=1e-3)
