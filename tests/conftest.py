"""Micro-models of every family, text to run them on, and what was made with them once."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
import transformers
import yaml
from hypothesis import settings

from longrope.compat import auto_class
from longrope.models.bundled import BUNDLED
from longrope.rope.pair import RescalePair
from longrope.rope.rescale import Rescale
from longrope.rope.rotary import find_rotary
from whole_run import RECIPE, run

# A busy machine is no failure; CI runs the same examples every time.
settings.register_profile("longrope", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("longrope")

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--fuzz-seconds", type=float, default=60, help="Time of tests/fuzz (60).")
    parser.addoption(
        "--kill-stride", type=int, default=50, help="More writes before each kill of a run (50)."
    )


def pytest_collection_modifyitems(items):
    """The longest test first, so that the other process does not wait for it at the end."""
    items.sort(key=lambda item: item.name != "test_commands_and_code_run")


ORIGINAL = 64
_SHAPE = {
    "vocab_size": 1536,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": ORIGINAL,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
_MHA = {k: v for k, v in _SHAPE.items() if k != "num_key_value_heads"}
_WINDOW = {"sliding_window": 24}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# A query or key of 24 numbers, 8 of which are rotated, and values of 16.
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}
_UNSCALED = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}

FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**_SHAPE),
    "mistral": lambda: transformers.MistralConfig(**_SHAPE, **_WINDOW),
    "qwen2": lambda: transformers.Qwen2Config(
        **_SHAPE, **_WINDOW, use_sliding_window=True, max_window_layers=2
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_SHAPE, head_dim=32),
    "phi3": lambda: transformers.Phi3Config(**_SHAPE),
    "gemma": lambda: transformers.GemmaConfig(**_SHAPE, head_dim=32),
    "gemma2": lambda: transformers.Gemma2Config(
        **_SHAPE, **_WINDOW, head_dim=32, query_pre_attn_scalar=32
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_SHAPE,
        **_WINDOW,
        head_dim=32,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    # of 16 frequencies in its full layers 4 are not 0; heads of another size in the others
    "gemma4": lambda: transformers.Gemma4TextConfig(
        **_SHAPE,
        **_WINDOW,
        head_dim=16,
        global_head_dim=32,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_MHA),
    "olmo2": lambda: transformers.Olmo2Config(**_SHAPE),
    "granite": lambda: transformers.GraniteConfig(
        **_SHAPE,
        embedding_multiplier=2.0,
        logits_scaling=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.3,
    ),
    "smollm3": lambda: transformers.SmolLM3Config(**_SHAPE),
    "cohere": lambda: transformers.CohereConfig(**_SHAPE),  # interleaved columns
    "glm": lambda: transformers.GlmConfig(**_SHAPE, head_dim=16),  # interleaved and partial
    "phi": lambda: transformers.PhiConfig(**_SHAPE),
    "stablelm": lambda: transformers.StableLmConfig(**_SHAPE),
    "starcoder2": lambda: transformers.Starcoder2Config(**_SHAPE),
    "mixtral": lambda: transformers.MixtralConfig(**_SHAPE, num_local_experts=4),
    # sinks in its attention
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_SHAPE, **_WINDOW, **_UNSCALED, head_dim=16, num_local_experts=4, num_experts_per_tok=2
    ),
    # complex numbers for cosines and sines
    "deepseek_v2": lambda: transformers.DeepseekV2Config(**_MHA, **_LATENT, **_EXPERTS),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**_MHA, **_LATENT, **_EXPERTS),
    # convolutions, or a state, in place of attention in every other layer
    "lfm2": lambda: transformers.Lfm2Config(
        **_SHAPE, layer_types=["conv", "full_attention"] * 2, block_multiple_of=32
    ),
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(
        **_SHAPE,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"] * 2,
    ),
}


_PICTURE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
_PICTURE |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
# Models for pictures too, whose decoder gets embeddings; of the first it gets masks of its own, and
# transformers has it as a causal model; the last has positions on three axes.
FOR_PICTURES = {
    "gemma3_whole": lambda: transformers.Gemma3Config(
        text_config=FAMILIES["gemma3"]().to_dict(), vision_config=_PICTURE
    ),
    "mistral3": lambda: transformers.Mistral3Config(
        text_config=FAMILIES["mistral"]().to_dict(),
        vision_config=_PICTURE | {"model_type": "pixtral"},
    ),
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(
        text_config=FAMILIES["qwen2"]().to_dict()
        | {"rope_parameters": _UNSCALED["rope_parameters"] | {"mrope_section": [2, 3, 3]}},
        vision_config={"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2}
        | {"out_hidden_size": 64},
    ),
}


# Where they are not 16 and 10,000.
ROTARY_DIM = {"qwen3": 32, "gemma": 32, "gemma2": 32, "gemma3": 32}
ROTARY_DIM |= {"gpt_neox": 4, "glm": 8, "phi": 8, "stablelm": 4}
ROTARY_DIM |= {"deepseek_v2": 8, "deepseek_v3": 8, "qwen3_5": 8, "gemma4": 32}
THETA = {"gemma3": 1e6, "gemma4": 1e6, "smollm3": 2e6, "cohere": 5e5, "lfm2": 1e6, "mixtral": 1e6}


def micro_model(config, seed: int = 0):
    """A model with random weights large enough that attention matters."""
    torch.manual_seed(seed)
    model = auto_class(config).from_config(config).eval()
    if "num_experts_per_tok" in config.to_dict():
        model.set_experts_implementation("eager")  # the others have no float64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


RECOVERY = 80


def pair(model, recovery: int = RECOVERY) -> RescalePair:
    """Factors for a micro-model: short up to ``recovery`` tokens, long beyond."""
    site = find_rotary(model)
    half, theta = len(site.inv_freq), float(site.parameters["rope_theta"])
    shared = {"rope_theta": theta, "original_max_position_embeddings": 64, "attention_factor": 1.1}
    short = Rescale(tuple(np.linspace(1, 2, half)), max_position_embeddings=recovery, **shared)
    long = Rescale(tuple(np.linspace(1, 9, half)), max_position_embeddings=512, **shared)
    return RescalePair(short, long)


@pytest.fixture(scope="session")
def micro_models():
    """Name → model, made when first asked for; tests leave them as they found them."""
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = micro_model((FAMILIES | FOR_PICTURES)[name]())
        return made[name]

    return get


@pytest.fixture(scope="session")
def checkpoints(micro_models, tmp_path_factory):
    """Name → directory of the micro-model with the bundled tokenizer."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            micro_models(name).save_pretrained(made[name])
            for file in BUNDLED.glob("tokenizer*"):
                (made[name] / file.name).write_bytes(file.read_bytes())
        return made[name]

    return get


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LONGROPE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def ids():
    """Token ids, shape (2, 97)."""
    return torch.randint(3, 1536, (2, 97), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder of four documents of some thousand tokens."""
    from longrope.data.stdlib import library_texts

    folder = tmp_path_factory.mktemp("texts")
    library = library_texts(held_out=True)
    for name in ("argparse", "http", "ipaddress", "mailbox"):
        (folder / f"{name}.txt").write_text(library[name][:12_000])
    return folder


@pytest.fixture(scope="session")
def small_search(texts):
    """A search of seconds: options that every other shares."""
    shared = ["search", "bundled", "--target", "2x", "--data", texts, "--windows", 2]
    return [*shared, "--transfer", "none", "--algorithm", "evolution"]


@pytest.fixture(scope="session")
def benchmark_data(tmp_path_factory):
    """Questions in the hub's own layout: one data set as Parquet, the other as JSONL."""
    import datasets

    root = tmp_path_factory.mktemp("benchmarks")
    folder = root / "allenai" / "ai2_arc" / "ARC-Challenge"
    folder.mkdir(parents=True)
    rows = [
        {
            "question": f"def f{i}(x): return x + {i}. What does f{i}({i}) return?",
            "choices": {"text": [str(2 * i), "None", "x", "a list of it"], "label": list("ABCD")},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(14)
    ]
    datasets.Dataset.from_list(rows).to_parquet(folder / "validation-00000-of-00001.parquet")
    (root / "hellaswag").mkdir()
    lines = [
        {
            "ctx_a": f"import module{i}",
            "ctx_b": "then",
            "activity_label": "Code",
            "endings": [f"module{i}.run()", "return [x] None", "pass", "print(1)"],
            "label": str(i % 4),
        }
        for i in range(14)
    ]
    for split in ("train", "validation"):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (root / "hellaswag" / f"{split}.jsonl").write_text(text)
    return root


@pytest.fixture(scope="session")
def arguments(checkpoints, texts, tmp_path_factory):
    """Model, recipe and data of a run of every stage."""
    recipe = tmp_path_factory.mktemp("recipe") / "small.yaml"
    content = RECIPE | {"model": str(checkpoints("llama")), "data": [str(texts)]}
    recipe.write_text(yaml.safe_dump(content))
    return ["--recipe", recipe]


@pytest.fixture(scope="session")
def finished(arguments, tmp_path_factory):
    """A run of every stage that nothing interrupted, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, run(*arguments, "--out", out)


@pytest.fixture(scope="session")
def trained(checkpoints, texts, tmp_path_factory):
    """A fine-tuning that nothing interrupted: where, its lines, and its pieces."""
    from small_training import train

    out = tmp_path_factory.mktemp("trained")
    lines, _, pieces = train(checkpoints("llama"), texts, out)
    return out, lines, pieces


@pytest.fixture(scope="session")
def taught(checkpoints, texts, tmp_path_factory):
    """The same with a teacher: where, and its lines."""
    from small_training import TAUGHT, train

    out = tmp_path_factory.mktemp("taught")
    lines, *_ = train(checkpoints("llama"), texts, out, TAUGHT)
    return out, lines
