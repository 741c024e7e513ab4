"""Which models of transformers that write text can be extended, tried out on each.

    python benchmarks/architectures.py                      # all, in a minute or two
    python benchmarks/architectures.py gpt_oss qwen3_5_text

A micro-model of every kind that transformers has, with random weights and an original length of 64
tokens, goes the way of an extension to 512: loaded and proved, and then, against transformers' own
forward without a cache,

- forward: the long forward's losses, 200 tokens in chunks of 70, in float64; the largest difference
  in nats;
- gradient: of the loss by each factor, in chunks of 40, in float64; the relative error;
- trained: a step of the training loss gives every weight a gradient that is finite;
- exported: transformers loads what is exported; the largest difference of a logit, to 200 tokens;
- generated: 20 tokens across the boundary of the short factors, each as it is without a cache.
"""

import argparse
import contextlib
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import record
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from longrope import load_model
from longrope.checkpoints.hf import export_model
from longrope.checkpoints.manifest import Manifest
from longrope.compat import auto_class
from longrope.execution import ExecutionConfig
from longrope.inference.generate import generate_tokens
from longrope.layerwise.backward import gradient
from longrope.layerwise.forward import LongForward
from longrope.models.bundled import BUNDLED
from longrope.models.load import LoadedModel
from longrope.rope.apply import rescaled
from longrope.rope.pair import RescalePair
from longrope.train.loss import chunked_loss

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from layerwise.test_backward import by_autograd

KINDS = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES | MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
ORIGINAL, TARGET = 64, 512
LARGEST = 1.2e8  # parameters: a config that does not follow these is larger
SMALL = {
    **{"vocab_size": 1536, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    **{"max_position_embeddings": ORIGINAL, "sliding_window": 24},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
    # experts
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4},
    **{"num_experts_per_tok": 2, "moe_k": 2, "n_shared_experts": 1, "moe_intermediate_size": 32},
    **{"shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1},
    "first_k_dense_replace": 1,
    # compressed keys and values
    **{"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16},
    **{"qk_head_dim": 32, "v_head_dim": 16},
    # states
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16},
    "linear_value_head_dim": 16,
}
# Of what looks at pictures and listens beside the text.
SENSE = {
    **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "depth": 1, "num_heads": 2},
    **{"embed_dim": 32, "out_hidden_size": 64, "num_position_embeddings": 16},
}
LATENT = "axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa "
LATENT += "longcat_flash minicpm3 mistral4 sarvam_mla youtu"
WITH_AXES = "qwen2_vl_text qwen2_5_vl_text glm4v_text glm_ocr_text"


def with_axes(**sections: list[int]) -> dict[str, Any]:
    """A RoPE of positions for each axis of a picture, and how many frequencies each has."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | sections}


# What a kind wants otherwise; None leaves a field to its default.
OTHER: dict[str, dict[str, Any]] = {
    **{kind: {"num_key_value_heads": 4, "head_dim": 16} for kind in LATENT.split()},
    **{k: {"head_dim": None} for k in ("falcon", "mixtral", "xlstm")},
    **{k: {"layer_types": None} for k in ("falcon_mamba", "jamba", "mamba", "mamba2")},
    "bamba": {"layer_types": None, "attn_layer_indices": [1, 3], "mamba_n_heads": 4}
    | {"mamba_d_head": 32, "mamba_d_state": 16},
    "falcon_h1": {"layer_types": None, "mamba_d_ssm": 64, "mamba_n_heads": 4}
    | {"mamba_d_head": 16, "mamba_d_state": 16},
    "gemma4_text": {"vocab_size_per_layer_input": 1536, "hidden_size_per_layer_input": 16}
    | {"global_head_dim": 32, "num_kv_shared_layers": 0},
    "helium": {"num_key_value_heads": 4, "head_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    # counts positions in units of what is the boundary in an export
    "ministral3": {
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "llama_4_scaling_beta": 0.1},
            "original_max_position_embeddings": ORIGINAL,
        }
    },
    "zaya": {"num_experts_per_tok": 1},
    **{k: with_axes(mrope_section=[2, 3, 3]) for k in WITH_AXES.split()},
    "paddleocr_vl_text": with_axes(mrope_section=[4, 6, 6]),
    "glm4v_moe_text": with_axes(mrope_section=[1, 1, 2]),
    "hunyuan_vl_text": with_axes(xdrope_section=[4, 4, 4, 4]),
    "qwen3_vl_moe_text": {"sliding_window": None},
}


def micro_config(kind: str) -> Any:
    """A small config of its kind, with a layer of each of its types."""
    default = CONFIG_MAPPING[kind]()
    text = default.get_text_config()
    if text is not default and text.model_type in CONFIG_MAPPING:
        senses = ((n, getattr(default, n)) for n in default.sub_configs)
        parts = {n: text if c is text else _known(c, SENSE) for n, c in senses if c is not None}
        micro = micro_config(text.model_type).to_dict()
        return CONFIG_MAPPING[kind](**{n: micro if c is text else c for n, c in parts.items()})
    chosen = _known(default, SMALL)
    types = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if types:
        chosen["layer_types"] = (types * 4)[:4]
    chosen |= OTHER.get(kind, {})
    return CONFIG_MAPPING[kind](**{k: v for k, v in chosen.items() if v is not None})


def _known(default: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    known = {*default.to_dict(), *dir(default)}
    return {name: value for name, value in sizes.items() if name in known}


def make(kind: str, directory: Path) -> str | None:
    """Write a micro-model; or say why there is none."""
    try:
        config = micro_config(kind)
        with torch.device("meta"):
            size = sum(p.numel() for p in auto_class(config).from_config(config).parameters())
        if size > LARGEST:
            return "its config does not take these sizes"
        torch.manual_seed(0)
        model = auto_class(config).from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.2)
        model.save_pretrained(directory)
    except Exception as error:  # the ways of two hundred configs
        return f"{type(error).__name__}: {error}".splitlines()[0]
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(directory)
    return None


def plain(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def forward(loaded: LoadedModel, pair: RescalePair, ids: torch.Tensor) -> float:
    with rescaled(loaded.model, pair.long):
        ours = LongForward(loaded.model, 70).losses(ids)
        logits = plain(loaded.model, ids)[:, :-1]
    exact = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (ours - exact).abs().max().item()


def grad(loaded: LoadedModel, pair: RescalePair, ids: torch.Tensor) -> float:
    model, row = loaded.model, ids[:, :150]
    before = model.config._attn_implementation
    with rescaled(model, pair.long, always=True):
        found = gradient(LongForward(loaded.model, 40), row).grad
        model.config._attn_implementation = "dense64"
        try:
            _, exact = by_autograd(model, row)
        finally:
            model.config._attn_implementation = before
    return ((found - exact).norm() / exact.norm()).item()


@contextlib.contextmanager
def in_float64(model: Any) -> Iterator[None]:
    """Where nothing is so near to another expert that rounding decides."""
    model.double()
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part._can_set_experts_implementation():
            part.set_experts_implementation("eager")  # the others have no float64
    try:
        yield
    finally:
        model.float()


def trained(loaded: LoadedModel, pair: RescalePair, ids: torch.Tensor) -> bool:
    model = loaded.model
    with rescaled(model, pair.long), chunked_loss(model, pair.short):
        model(input_ids=ids, short_ids=ids[:, None, :ORIGINAL])["loss"].backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return bool(grads) and all(bool(grad.isfinite().all()) for grad in grads)


def exported(loaded: LoadedModel, pair: RescalePair, ids: torch.Tensor) -> float:
    with tempfile.TemporaryDirectory() as directory:
        export_model(loaded, Manifest("hf", "micro", pair), Path(directory) / "model")
        theirs = auto_class(loaded.model.config).from_pretrained(Path(directory) / "model").eval()
    off = 0.0
    for tokens in (ORIGINAL, 200):
        with rescaled(loaded.model, pair.choose(tokens)):
            ours = plain(loaded.model, ids[:, :tokens])
        off = max(off, (plain(theirs, ids[:, :tokens]) - ours).abs().max().item())
    return off


def generated(loaded: LoadedModel, pair: RescalePair, ids: torch.Tensor) -> bool:
    row = ids[0, : ORIGINAL - 8].tolist()
    chunks = LongForward(loaded.model, 30)
    found = list(generate_tokens(loaded, pair.choose, row, max_new_tokens=20, forward=chunks))
    for token in found:
        with rescaled(loaded.model, pair.choose(len(row)), always=True):
            if int(plain(loaded.model, torch.tensor([row]))[0, -1].argmax()) != token:
                return False
        row.append(token)
    return True


Trial = Callable[[LoadedModel, RescalePair, torch.Tensor], Any]
IN_FLOAT64: dict[str, Trial] = {"forward": forward, "gradient": grad}
IN_FLOAT32: dict[str, Trial] = {"trained": trained, "exported": exported, "generated": generated}


def tried(kind: str) -> dict[str, Any]:
    """What came of one kind; ``made`` is false where the script has no model of it."""
    row: dict[str, Any] = {"kind": kind, "class": KINDS[kind]}
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory)
        if reason := make(kind, source):
            return row | {"made": False, "reason": reason}
        how: dict[str, Any] = {"rope_scaling": "replace", "original_length": ORIGINAL}
        try:
            loaded = load_model(directory, ExecutionConfig(dtype="float32"), **how)
        except ValueError as error:
            reason = str(error).replace(directory, "").partition("cannot be extended: ")[2]
            return row | {"made": True, "reason": reason or str(error).replace(directory, kind)}
        except Exception as error:
            return row | {"made": True, "crashed": f"{type(error).__name__}: {error}"[:300]}
        info = loaded.info
        pair = RescalePair(
            info.rescale("ntk", ORIGINAL).replace(attention_factor=1.2),
            info.rescale("yarn", TARGET).replace(attention_factor=1.2),
        )
        ids = torch.randint(3, 1500, (1, 200), generator=torch.Generator().manual_seed(0))
        with in_float64(loaded.model):
            row |= {name: ended(trial, loaded, pair, ids) for name, trial in IN_FLOAT64.items()}
        row |= {name: ended(trial, loaded, pair, ids) for name, trial in IN_FLOAT32.items()}
    return row | {"made": True}


def ended(trial: Trial, *given: Any) -> Any:
    """What a trial gives, or how it failed."""
    try:
        return trial(*given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="as transformers calls them")
    asked = parser.parse_args().kinds
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("longrope").setLevel(logging.ERROR)
    rows = []
    for kind in asked or KINDS:
        rows.append(tried(kind))
        print(json.dumps(rows[-1]), flush=True)
    if not asked:
        config = {"original": ORIGINAL, "target": TARGET, "sizes": SMALL}
        print(record.write("architectures", config, rows))


if __name__ == "__main__":
    main()
