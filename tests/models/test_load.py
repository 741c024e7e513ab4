import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from conftest import FAMILIES, FOR_PICTURES, ORIGINAL, ROTARY_DIM, THETA, micro_model
from longrope.distributed import SequenceParallelGroup
from longrope.execution import ExecutionConfig
from longrope.models.bundled import BUNDLED
from longrope.models.compatibility import effective_window, incompatibility, warn_if_out_of_reach
from longrope.models.info import inspect_model
from longrope.models.load import load_model
from longrope.rope.rescale import Rescale


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_of_every_family(checkpoints, micro_models, family):
    info = inspect_model(str(checkpoints(family)))
    config = FAMILIES[family]()
    if family.startswith("deepseek"):
        head_dim = (24 + 16) // 2
    elif family == "gemma4":
        head_dim = 32
    else:
        head_dim = getattr(config, "head_dim", None) or 16
    with_keys = 2 if family in ("lfm2", "qwen3_5") else 4
    assert info.extendable, info.reason
    assert info.original_max_position_embeddings == ORIGINAL  # never the sliding window, 24
    assert info.original_read_from == "max_position_embeddings"
    assert (info.layers, info.heads) == (4, 4)
    assert info.attention_layers == with_keys
    sliding = {"mistral": 4} | dict.fromkeys(("qwen2", "gemma2", "gemma3", "gemma4", "gpt_oss"), 2)
    assert info.sliding_layers == sliding.get(family, 0)
    assert info.sliding_window == (24 if family in sliding else None)
    other = {"gpt_neox": 4, "deepseek_v2": 4, "deepseek_v3": 4, "gemma4": 1}
    assert info.kv_heads == other.get(family, 2)
    assert info.head_dim == head_dim
    assert info.rotary_dim == ROTARY_DIM.get(family, 16)
    assert info.rope_theta == THETA.get(family, 1e4)
    assert info.rope_scaling is None
    assert info.dtype == "float32"
    assert info.kv_bytes_per_token == 2 * with_keys * info.kv_heads * head_dim * 4
    assert info.parameters == sum(p.numel() for p in micro_models(family).parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_and_is_probed(checkpoints, family):
    loaded = load_model(str(checkpoints(family)))
    assert not loaded.model.training
    assert loaded.info.extendable
    assert loaded.fingerprint() == load_model(str(checkpoints(family))).fingerprint()


def test_processes_cannot_share_a_sequence_where_layers_have_a_state(checkpoints):
    with pytest.raises(ValueError, match=r"sequence_parallel is 2: .*Lfm2ForCausalLM"):
        load_model(str(checkpoints("lfm2")), group=SequenceParallelGroup(0, 2))


@pytest.mark.parametrize("place", [1, 64, 65, -1])
def test_models_differ_by_one_number(checkpoints, tmp_path, place):
    other = tmp_path / "other"
    shutil.copytree(checkpoints("llama"), other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"].view(-1)[place] += 0.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(other) != fingerprint(checkpoints("llama"))


@pytest.mark.parametrize(
    ("key", "value", "differs"),
    [
        ("rms_norm_eps", 0.5, True),
        ("hidden_act", "relu", True),
        ("use_cache", False, False),
        ("transformers_version", "4.0", False),
    ],
)
def test_models_differ_by_what_their_config_computes(checkpoints, tmp_path, key, value, differs):
    other = tmp_path / "other"
    shutil.copytree(checkpoints("llama"), other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {key: value}))
    assert (fingerprint(other) != fingerprint(checkpoints("llama"))) == differs


def fingerprint(folder):
    return load_model(str(folder)).fingerprint()


WITHOUT = {
    "gpt2": (lambda: transformers.GPT2Config(), "no rotary"),
    "bloom": (lambda: transformers.BloomConfig(), "no rotary"),
    "opt": (lambda: transformers.OPTConfig(), "no rotary"),
    "mamba": (lambda: transformers.MambaConfig(), "no rotary"),
    "gptj": (lambda: transformers.GPTJConfig(), "rotary_dim"),
    "llama4": (
        lambda: transformers.Llama4TextConfig(num_hidden_layers=2),
        "chunks",
    ),
}


@pytest.mark.parametrize("kind", WITHOUT)
def test_what_cannot_be_rescaled_is_refused_before_its_weights_are_read(tmp_path, kind):
    config, message = WITHOUT[kind]
    config().save_pretrained(tmp_path)  # there are no weights to read
    info = inspect_model(str(tmp_path))
    assert not info.extendable
    assert message in info.reason
    with pytest.raises(ValueError, match=f"{info.architecture}.*{message}"):
        load_model(str(tmp_path))


def test_no_causal_language_model(tmp_path):
    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'t5' .*causal"):
        inspect_model(str(tmp_path))


def test_a_model_without_a_tokenizer_is_told_what_is_missing(checkpoints, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(checkpoints("llama") / name, tmp_path / name)
    with pytest.raises(ValueError, match=r"no tokenizer \(tokenizer\.json"):
        load_model(str(tmp_path))


def test_original_length_can_be_told(checkpoints):
    info = inspect_model(str(checkpoints("llama")), original_length=32)
    assert info.original_max_position_embeddings == 32
    assert info.original_read_from == "original_length"


def test_an_overflow_in_float16_names_the_dtype(checkpoints, tmp_path):
    shutil.copytree(checkpoints("llama"), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 1e6
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e6
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"not finite in float16.*try bfloat16"):
        load_model(str(tmp_path / "m"), ExecutionConfig(dtype="float16"))


def test_nan_weights_are_named(checkpoints, tmp_path):
    shutil.copytree(checkpoints("llama"), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    said = r"not finite in float32; 1 weight tensors.*layers\.1\.mlp\.up_proj\.weight$"
    with pytest.raises(ValueError, match=said):
        load_model(str(tmp_path / "m"))


@pytest.mark.parametrize("family", ["llama", "gemma"])  # the head its own; the embeddings again
def test_a_checkpoint_that_lacks_tensors_is_refused(checkpoints, tmp_path, family):
    shutil.copytree(checkpoints(family), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r": 1 .*layers\.1\.mlp\.up_proj"):
        load_model(str(tmp_path / "m"))


def test_a_rescale_without_effect_is_refused(checkpoints, tmp_path):
    shutil.copytree(checkpoints("llama"), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for name, tensor in tensors.items():
        if "o_proj" in name:
            tensor.zero_()
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"change .*logits"):
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
        info = inspect_model(str(tmp_path), rope_scaling=how)
        assert "'ntk_alpha'" in info.reason


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
    with pytest.raises(ValueError, match=r"DogeForCausalLM.*attention mask"):
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
    loaded = load_model(str(tmp_path / "m"), ExecutionConfig(device="cpu"))
    assert loaded.info.quantized
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
    with pytest.raises(ValueError, match=r"window of 24 .*mask"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(("family", "near"), [("mistral", True), ("gemma3", False)])
def test_a_model_whose_window_limits_its_context_is_warned_of(checkpoints, caplog, family, near):
    loaded = load_model(str(checkpoints(family)))
    warn_if_out_of_reach(loaded.model, loaded.info, 24)
    assert not caplog.text
    warn_if_out_of_reach(loaded.model, loaded.info, 512)
    assert ("window of 24 " in caplog.text) is near


def test_full_attention_layers_without_rope_do_not_extend_the_effective_window():
    """Cohere 2's full layers have no RoPE, which no config says."""
    shape = FAMILIES["cohere"]().to_dict() | {"sliding_window": 24, "layer_types": None}
    config = transformers.Cohere2Config(**shape | {"sliding_window_pattern": 4})
    assert config.layer_types.count("full_attention") == 1
    model = micro_model(config)
    rescale = Rescale((1.0,) * 8, 5e5, 64, 512)
    assert incompatibility(model, rescale) is None
    assert effective_window(model, rescale) == 24


@pytest.mark.parametrize(
    ("option", "value"),
    [("device", "cuda:7"), ("dtype", "int8"), ("chunk_size", 0), ("offload_weights", "some")],
)
def test_wrong_options_are_named(checkpoints, option, value):
    with pytest.raises(ValueError, match=f"^{option} is .*{value}"):
        load_model(str(checkpoints("llama")), ExecutionConfig.make({option: value}))


def test_dtype(checkpoints):
    assert (
        load_model(str(checkpoints("llama")), ExecutionConfig(dtype="bfloat16")).model.dtype
        == torch.bfloat16
    )


def test_bundled_is_what_its_card_says():
    info = inspect_model("bundled")
    assert info.architecture == "LlamaForCausalLM"
    assert 2_000_000 <= info.parameters <= 3_000_000
    assert info.original_max_position_embeddings == 256
    assert info.dtype == "float32"
    assert 1000 <= info.vocabulary <= 2000
    from longrope.data.stdlib import HELD_OUT

    files = sorted(path.name for path in BUNDLED.iterdir() if path.is_file())
    assert sum((BUNDLED / name).stat().st_size for name in files) <= 6 * 1024**2
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    assert json.loads((BUNDLED / "training.json").read_text())["held_out"] == list(HELD_OUT)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_for_pictures_is_tied_as_its_whole_config_says(tmp_path, tied):
    """Its text's config says otherwise, or nothing; the text's attention is what is trained."""
    text = FAMILIES["gemma2"]().to_dict() | {"tie_word_embeddings": not tied}
    vision = FOR_PICTURES["mistral3"]().vision_config.to_dict()
    whole = transformers.Mistral3Config(
        text_config=text, vision_config=vision, tie_word_embeddings=tied
    )
    whole.save_pretrained(tmp_path)
    info = inspect_model(str(tmp_path))
    assert info.tied == tied
    assert info.explicit_scores  # Gemma 2's soft-caps
    assert info.active_parameters < info.parameters
