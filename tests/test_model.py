import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from conftest import FAMILIES, ORIGINAL, ROTARY_DIM, THETA, micro_model
from longrope.facts import inspect_model
from longrope.forward import LongForward
from longrope.importing import import_pair
from longrope.model import load_model
from longrope.parallel import Team
from longrope.rope.install import installed
from longrope.source import BUNDLED

SCALED = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0, 1.1, 1.5, 2.0, 3.0, 4.0, 4.0, 4.0],
        "original_max_position_embeddings": 16,
    },
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


@pytest.fixture
def scaled(checkpoints, tmp_path):
    """A micro-Llama's directory with scaling written into its config."""

    def make(kind: str):
        shutil.copytree(checkpoints("llama"), tmp_path / kind)
        path = tmp_path / kind / "config.json"
        config = json.loads(path.read_text())
        config["rope_parameters"] = {"rope_theta": 1e4} | SCALED[kind]
        path.write_text(json.dumps(config))
        return str(tmp_path / kind)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_of_every_family(checkpoints, micro_models, family):
    facts = inspect_model(str(checkpoints(family)))
    config = FAMILIES[family]()
    if family.startswith("deepseek"):
        head_dim = (24 + 16) // 2
    elif family == "gemma4":
        head_dim = 32
    else:
        head_dim = getattr(config, "head_dim", None) or 16
    with_keys = 2 if family in ("lfm2", "qwen3_5") else 4
    assert facts.extendable, facts.reason
    assert facts.original_max_position_embeddings == ORIGINAL  # never the sliding window, 24
    assert facts.original_read_from == "max_position_embeddings"
    assert (facts.layers, facts.heads) == (4, 4)
    assert facts.attention_layers == with_keys
    other = {"gpt_neox": 4, "deepseek_v2": 4, "deepseek_v3": 4, "gemma4": 1}
    assert facts.kv_heads == other.get(family, 2)
    assert facts.head_dim == head_dim
    assert facts.rotary_dim == ROTARY_DIM.get(family, 16)
    assert facts.rope_theta == THETA.get(family, 1e4)
    assert facts.existing_scaling is None
    assert facts.dtype == "float32"
    assert facts.kv_bytes_per_token == 2 * with_keys * facts.kv_heads * head_dim * 4
    assert facts.parameters == sum(p.numel() for p in micro_models(family).parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_and_is_probed(checkpoints, family):
    loaded = load_model(str(checkpoints(family)))
    assert not loaded.model.training
    assert loaded.facts.extendable
    assert loaded.fingerprint() == load_model(str(checkpoints(family))).fingerprint()


def test_processes_cannot_share_a_sequence_where_layers_have_a_state(checkpoints):
    with pytest.raises(ValueError, match=r"--sequence-parallel 2: layers of Lfm2ForCausalLM"):
        load_model(str(checkpoints("lfm2")), team=Team(0, 2))


def test_models_differ_by_fingerprint(checkpoints, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(checkpoints("llama"), other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert (
        load_model(str(other)).fingerprint() != load_model(str(checkpoints("llama"))).fingerprint()
    )


WITHOUT = {
    "gpt2": (lambda: transformers.GPT2Config(), "no rotary position embedding"),
    "bloom": (lambda: transformers.BloomConfig(), "no rotary position embedding"),
    "opt": (lambda: transformers.OPTConfig(), "no rotary position embedding"),
    "mamba": (lambda: transformers.MambaConfig(), "no rotary position embedding"),
    "gptj": (lambda: transformers.GPTJConfig(), "not one longrope can rescale"),
    "llama4": (
        lambda: transformers.Llama4TextConfig(num_hidden_layers=2),
        "see chunks of a text, which only a mask says",
    ),
}


@pytest.mark.parametrize("kind", WITHOUT)
def test_what_cannot_be_rescaled_is_refused_before_its_weights_are_read(tmp_path, kind):
    config, message = WITHOUT[kind]
    config().save_pretrained(tmp_path)  # there are no weights to read
    facts = inspect_model(str(tmp_path))
    assert not facts.extendable
    assert message in facts.reason
    with pytest.raises(ValueError, match=f"{facts.architecture}.*{message}"):
        load_model(str(tmp_path))


def test_no_causal_language_model(tmp_path):
    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'t5' model is not a causal"):
        inspect_model(str(tmp_path))


@pytest.mark.parametrize("kind", SCALED)
def test_scaling_must_be_kept_or_replaced(scaled, kind):
    source = scaled(kind)
    facts = inspect_model(source)
    assert not facts.extendable
    assert ("--existing-scaling keep" in facts.reason) == (kind != "dynamic")
    assert "--existing-scaling replace" in facts.reason
    assert facts.existing_scaling["rope_type"] == kind
    with pytest.raises(ValueError, match="--existing-scaling"):
        load_model(source)


@pytest.mark.parametrize("kind", SCALED)
def test_replaced_scaling_starts_over(scaled, micro_models, ids, kind):
    """The model is the unscaled one, also below n̂, and in chunks."""
    told = 16 if kind == "linear" else None
    loaded = load_model(scaled(kind), existing_scaling="replace", original_length=told)
    facts = loaded.facts
    assert facts.original_max_position_embeddings == (ORIGINAL if kind == "dynamic" else 16)
    if kind in ("yarn", "llama3", "longrope"):
        assert facts.original_read_from == "rope_parameters.original_max_position_embeddings"
    assert facts.existing_scaling["rope_type"] == kind
    none = facts.rescale("none", 128)
    assert set(none.factors) == {1.0}
    assert none.attention_factor == 1
    unscaled = micro_models("llama")
    with torch.no_grad():
        for rescale in (none, facts.rescale("yarn", 128).replace(start_tokens=8)):
            with installed(loaded.model, rescale), installed(unscaled, rescale):
                ours = loaded.model(input_ids=ids, use_cache=False).logits
                expected = unscaled(input_ids=ids, use_cache=False).logits
                chunked = LongForward(loaded.model, 20).losses(ids)
                whole = LongForward(unscaled).losses(ids)
            torch.testing.assert_close(ours, expected)
            torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)


def test_linear_scaling_does_not_say_what_it_was(scaled):
    facts = inspect_model(scaled("linear"), existing_scaling="replace")
    assert not facts.extendable
    assert "give --original-length" in facts.reason


@pytest.mark.parametrize("kind", ["yarn", "llama3", "longrope", "linear"])
def test_kept_scaling_is_the_start(scaled, kind, ids):
    """With the scaling kept, 'none' computes what the model does, beyond its original length."""
    loaded = load_model(scaled(kind), existing_scaling="keep")
    facts = loaded.facts
    assert facts.original_max_position_embeddings == ORIGINAL
    base = facts.rescale("none", 4 * ORIGINAL)
    with torch.no_grad():
        own = loaded.model(input_ids=ids, use_cache=False).logits
        unscaled = base.replace(factors=(1.0,) * 8, attention_factor=1.0)
        with installed(loaded.model, base):
            kept = loaded.model(input_ids=ids, use_cache=False).logits
        with installed(loaded.model, unscaled):
            plain = loaded.model(input_ids=ids, use_cache=False).logits
        with installed(loaded.model, base):  # one factor set, whatever the chunk
            chunked = LongForward(loaded.model, 7).losses(ids)
            whole = LongForward(loaded.model).losses(ids)
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kept, own, rtol=1e-4, atol=1e-4)
    assert (plain - own).abs().max() > 1e-2
    doubled = facts.rescale("pi", 2 * ORIGINAL)
    assert doubled.factors == pytest.approx([2 * f for f in base.factors])


@pytest.mark.parametrize(
    ("kind", "factor", "length"),
    [
        ("yarn", 8.0, 128),
        ("yarn", 2.0, ORIGINAL),
        ("llama3", 2.0, ORIGINAL),  # Llama 3.1
        ("llama3", 32.0, ORIGINAL),  # Llama 3.2: its factor is no ratio of lengths
    ],
)
def test_the_scaled_length_is_what_the_config_says_or_its_factor(scaled, kind, factor, length):
    """Some configs leave max_position_embeddings as it was, others raise it."""
    source = scaled(kind)
    path = Path(source) / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["factor"] = factor
    path.write_text(json.dumps(config))
    facts = inspect_model(source, existing_scaling="keep")
    assert facts.original_max_position_embeddings == length
    assert f"its scaled length, {length:,}," in inspect_model(source).reason
    assert import_pair(source).long.max_position_embeddings == length


def test_what_to_do_with_scaling_is_one_of_two(scaled):
    with pytest.raises(ValueError, match="existing_scaling is 'Keep'; choose keep or replace"):
        load_model(scaled("yarn"), existing_scaling="Keep")


def test_a_length_that_transformers_filled_in_is_called_so(scaled):
    source = scaled("yarn")
    path = Path(source) / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"], config["max_position_embeddings"]
    path.write_text(json.dumps(config))
    facts = inspect_model(source)
    assert facts.original_max_position_embeddings == 2048
    assert facts.original_read_from == "the default of LlamaConfig: its config.json does not say"


def test_a_model_without_a_tokenizer_is_told_what_is_missing(checkpoints, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(checkpoints("llama") / name, tmp_path / name)
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_model(str(tmp_path))


def test_dynamic_scaling_cannot_be_kept(scaled):
    with pytest.raises(ValueError, match="changes with the length and cannot be kept"):
        load_model(scaled("dynamic"), existing_scaling="keep")


def test_original_length_can_be_told(checkpoints):
    facts = inspect_model(str(checkpoints("llama")), original_length=32)
    assert facts.original_max_position_embeddings == 32
    assert facts.original_read_from == "--original-length"


def test_nan_weights_are_named(checkpoints, tmp_path):
    shutil.copytree(checkpoints("llama"), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"not finite; 1 weight tensors.*layers\.1\.mlp\.up_proj"):
        load_model(str(tmp_path / "m"))


@pytest.mark.parametrize("family", ["llama", "gemma"])  # the head its own; the embeddings again
def test_a_checkpoint_that_lacks_tensors_is_refused(checkpoints, tmp_path, family):
    shutil.copytree(checkpoints(family), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"1 of the model's tensors are missing, such as .*up_proj"
    ):
        load_model(str(tmp_path / "m"))


def test_a_rescale_without_effect_is_refused(checkpoints, tmp_path):
    shutil.copytree(checkpoints("llama"), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for name, tensor in tensors.items():
        if "o_proj" in name:
            tensor.zero_()
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="a rescale does not change its logits"):
        load_model(str(tmp_path / "m"))


def test_a_scaling_of_its_own_kind_is_not_replaced(tmp_path):
    """HunYuan calls ``dynamic`` what its module knows to be another."""
    config = transformers.HunYuanDenseV1Config(
        **{"vocab_size": 1536, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 100.0, "factor": 1.0},
    )
    config.save_pretrained(tmp_path)
    for how in (None, "keep", "replace"):
        facts = inspect_model(str(tmp_path), existing_scaling=how)
        assert "'ntk_alpha', which cannot be rescaled" in facts.reason


def test_layers_of_another_kind_are_refused_by_name(checkpoints, tmp_path):
    config = transformers.DogeConfig(
        vocab_size=1536,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    micro_model(config).save_pretrained(tmp_path)
    for file in BUNDLED.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    with pytest.raises(ValueError, match=r"DogeForCausalLM.*an attention mask"):
        load_model(str(tmp_path))


def test_weights_of_four_bits_are_dequantised(checkpoints, tmp_path):
    """GPT-OSS as it is published: of experts 16 bytes for 32 numbers, and their exponent."""
    shutil.copytree(checkpoints("gpt_oss"), tmp_path / "m")
    file, config_file = (tmp_path / "m" / name for name in ("model.safetensors", "config.json"))
    tensors, generator = load_file(file), torch.Generator().manual_seed(0)
    name = "model.layers.1.mlp.experts.down_proj"
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, rows, columns = tensors.pop(key).shape
        shape = experts, columns, rows // 32
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(122, 126, shape, generator=generator, dtype=torch.uint8)
        tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
    save_file(tensors, file, metadata={"format": "pt"})
    kept = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    config = json.loads(config_file.read_text()) | {"quantization_config": quantization}
    config_file.write_text(json.dumps(config))
    loaded = load_model(str(tmp_path / "m"), device="cpu")
    assert loaded.facts.quantized
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = torch.cat([magnitudes, -magnitudes])
    blocks, scales = (tensors[f"{name}_{kind}"].long() for kind in ("blocks", "scales"))
    pairs = torch.stack([numbers[blocks % 16], numbers[blocks // 16]], dim=-1).flatten(-2)
    expected = (pairs * torch.exp2(scales[..., None] - 127.0)).flatten(-2).transpose(1, 2)
    found = loaded.model.get_submodule("model.layers.1.mlp.experts").down_proj
    assert torch.equal(found.float(), expected)


def test_a_sliding_window_that_only_a_mask_knows_is_refused(tmp_path):
    config = transformers.PhimoeConfig(
        vocab_size=1536,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        sliding_window=24,
    )
    micro_model(config).save_pretrained(tmp_path)
    for file in BUNDLED.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    with pytest.raises(ValueError, match="sliding window of 24 tokens is in a mask"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(("option", "value"), [("device", "cuda:7"), ("dtype", "int8")])
def test_wrong_options_are_named(checkpoints, option, value):
    with pytest.raises(ValueError, match=f"--{option} {value}"):
        load_model(str(checkpoints("llama")), **{option: value})


def test_dtype(checkpoints):
    assert load_model(str(checkpoints("llama")), dtype="bfloat16").model.dtype == torch.bfloat16


def test_bundled_is_what_its_card_says():
    facts = inspect_model("bundled")
    assert facts.architecture == "LlamaForCausalLM"
    assert 2_000_000 <= facts.parameters <= 3_000_000
    assert facts.original_max_position_embeddings == 256
    assert facts.dtype == "float32"
    assert 1000 <= facts.vocabulary <= 2000
    from longrope.library import HELD_OUT

    files = sorted(path.name for path in BUNDLED.iterdir() if path.is_file())
    assert sum((BUNDLED / name).stat().st_size for name in files) <= 6 * 1024**2
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    assert json.loads((BUNDLED / "training.json").read_text())["held_out"] == list(HELD_OUT)
