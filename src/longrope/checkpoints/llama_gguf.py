"""Convert a Llama or Mistral checkpoint to GGUF, as llama.cpp's converter does."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from longrope.checkpoints.gguf_io import Metadata, Tensor
from longrope.data.encoding import check_ids
from longrope.files.parse import content_of, read_json
from longrope.models.gguf_file import require_gguf
from longrope.models.weights import has_own_head, stored_tensors, weight_files

_HEAD, _EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
_KNOWN = ("LlamaForCausalLM", "MistralForCausalLM")
_CONVERT = (
    "convert the model with llama.cpp's convert_hf_to_gguf.py, and give that .gguf file as `model`"
)
_BYTE_LEVEL = {"add_prefix_space": False, "use_regex": True}
# Pattern of Llama 3's pre-tokenizer in tokenizer.json; llama.cpp calls it llama-bpe.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FREQUENCIES = "rotary_emb.inv_freq"  # a tensor of checkpoints of 2023
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def llama_metadata(directory: Path) -> tuple[str, Metadata]:
    """Return the GGUF architecture and metadata of a Llama checkpoint, without RoPE scaling.

    Raises:
        ValueError: another architecture, attention or tokenizer than this converter knows.
    """
    import gguf

    config = _config(directory)
    kinds = gguf.GGUFValueType
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    theta = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta"))
    numbers = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "vocab_size": config["vocab_size"],
    }
    rates = {
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": 10000.0 if theta is None else theta,
    }
    # llama.cpp treats a model whose name contains "phi3" as Phi-3.
    name = Path(config.get("_name_or_path") or directory.resolve()).name.replace("phi3", "phi-3")
    items: Metadata = [("general.name", name, kinds.STRING, None)]
    items += [(f"llama.{key}", value, kinds.UINT32, None) for key, value in numbers.items()]
    items += [(f"llama.{key}", value, kinds.FLOAT32, None) for key, value in rates.items()]
    with content_of(directory / "tokenizer.json", _CONVERT):
        return "llama", items + _tokenizer(directory, config["vocab_size"])


def llama_tensors(directory: Path) -> list[Tensor]:
    """List a Llama checkpoint's weights under llama.cpp's names, in its dtype (vectors in float32).

    Raises:
        ValueError: a tensor that llama.cpp has no name for.
    """
    import gguf

    config = _config(directory)
    tied = config.get("tie_word_embeddings") and not has_own_head(directory)
    named = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"]}
    heads["k_proj"] = config.get("num_key_value_heads") or heads["q_proj"]
    tensors, stored = [], {name for name, _ in stored_tensors(directory)}
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (a safetensors file is no dict)
                if name == _HEAD and tied and _EMBEDDINGS in stored:
                    continue
                if name.endswith(_FREQUENCIES):
                    continue
                # Of tied weights a checkpoint may store either one; llama.cpp reads embeddings.
                meant = _EMBEDDINGS if name == _HEAD and tied else name
                theirs = named.get_name(meant, try_suffixes=(".weight", ".bias"))
                if theirs is None:
                    raise ValueError(
                        f"{file}: llama.cpp's llama architecture has no tensor like {name!r}; "
                        + _CONVERT
                    )
                part = weights.get_slice(name)
                halves = next((n for kind, n in heads.items() if kind in name), None)
                tensors.append(_tensor(theirs, file, name, part, halves))
    return tensors


def _tensor(theirs: str, file: Path, name: str, part: Any, heads: int | None) -> Tensor:
    import gguf

    shape: tuple[int, ...] = tuple(part.get_shape())
    kinds = gguf.GGMLQuantizationType
    stored = {"BF16": kinds.BF16, "F16": kinds.F16}.get(part.get_dtype(), kinds.F32)
    kind = stored if len(shape) > 1 else kinds.F32
    size = {kinds.BF16: 2, kinds.F16: 2}.get(kind, 4)
    dtype = {kinds.BF16: np.uint8, kinds.F16: np.float16}.get(kind, np.float32)
    written = (*shape[:-1], *(2 * n for n in shape[-1:])) if kind == kinds.BF16 else shape

    def data() -> np.ndarray:
        with safe_open(file, framework="pt") as weights:
            tensor = weights.get_tensor(name)
        if heads is not None:  # llama.cpp rotates neighbouring rows, transformers the two halves
            split = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
            tensor = split.transpose(1, 2).reshape(tensor.shape).contiguous()
        if kind == kinds.BF16:
            return tensor.view(torch.uint8).numpy()
        return tensor.to(torch.float16 if kind == kinds.F16 else torch.float32).numpy()

    return Tensor(theirs, written, dtype, math.prod(shape) * size, kind, data)


def _config(directory: Path) -> dict[str, Any]:
    config = read_json(directory / "config.json")
    architecture = (config.get("architectures") or ["?"])[0]
    if architecture not in _KNOWN:
        raise ValueError(
            f"{directory} is of the architecture {architecture}, and longrope converts only "
            f"{' and '.join(_KNOWN)} to GGUF; {_CONVERT}"
        )
    window = config.get("sliding_window")
    if architecture == "MistralForCausalLM" and window:
        raise ValueError(
            f"{directory}: sliding_window is {window:,}, which llama.cpp's llama architecture "
            "ignores; use format='hf'"
        )
    if (config.get("hidden_act") or "silu") != "silu":
        raise ValueError(
            f"{directory}: hidden_act is {config['hidden_act']!r}, but llama.cpp's llama "
            "architecture has only silu; use format='hf'"
        )
    return config


def _tokenizer(directory: Path, vocabulary: int) -> Metadata:
    """Convert a Llama checkpoint's byte-level BPE tokenizer to GGUF key-value pairs."""
    import gguf

    kinds = gguf.GGUFValueType
    file = directory / "tokenizer.json"
    if not file.exists():
        raise _unknown_tokenizer(directory, "there is no tokenizer.json")
    content = read_json(file)
    model = content["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise _unknown_tokenizer(directory, "it is not a byte-level BPE")
    tokens = [f"[PAD{i}]" for i in range(vocabulary)]
    types = [_UNUSED] * vocabulary
    # Added tokens beyond the embeddings, such as a <pad>, are left out: the model has none of them.
    added_ids = {added["id"] for added in content["added_tokens"]}
    regular = [i for i in model["vocab"].values() if i not in added_ids]
    check_ids(np.array(regular), vocabulary, f"{file}")
    for token, i in model["vocab"].items():
        if i < vocabulary:
            tokens[i], types[i] = token, _NORMAL
    for added in content["added_tokens"]:
        if added["id"] < vocabulary:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    items: Metadata = [
        ("tokenizer.ggml.model", "gpt2", kinds.STRING, None),
        ("tokenizer.ggml.pre", _splitter(directory, content), kinds.STRING, None),
        ("tokenizer.ggml.tokens", tokens, kinds.ARRAY, kinds.STRING),
        ("tokenizer.ggml.token_type", types, kinds.ARRAY, kinds.INT32),
        ("tokenizer.ggml.merges", merges, kinds.ARRAY, kinds.STRING),
        ("tokenizer.ggml.add_bos_token", _adds_bos(content), kinds.BOOL, None),
    ]
    special = gguf.SpecialVocab(directory, load_merges=False)
    for name, number in special.special_token_ids.items():
        if name == "bos" and _adds_bos(content):
            check_ids(np.array([number]), vocabulary, f"{file}: BOS")
        if number < vocabulary:
            items.append(
                (f"tokenizer.ggml.{_NAMES.get(name, name)}_token_id", number, kinds.UINT32, None)
            )
    return items + _chat_templates(special.chat_template)


def _chat_templates(found: str | Sequence[Mapping[str, str]] | None) -> Metadata:
    """Return the chat templates of a tokenizer as llama.cpp reads them: one, or one by name."""
    kinds = require_gguf().GGUFValueType
    if isinstance(found, str):
        found = [{"name": "default", "template": found}]
    named = {re.sub(r"\W", "_", item["name"]): item["template"] for item in found or []}
    items: Metadata = []
    if "default" in named:
        items.append(("tokenizer.chat_template", named.pop("default"), kinds.STRING, None))
    for name, template in named.items():
        items.append((f"tokenizer.chat_template.{name}", template, kinds.STRING, None))
    if named:
        items.append(("tokenizer.chat_templates", list(named), kinds.ARRAY, kinds.STRING))
    return items


_NAMES = {"unk": "unknown", "pad": "padding", "sep": "seperator"}  # (their spelling)


def _adds_bos(content: dict[str, Any]) -> bool:
    processor = content.get("post_processor") or {}
    parts = processor.get("processors", [processor])
    singles = [part["single"] for part in parts if part.get("type") == "TemplateProcessing"]
    return any(single and "SpecialToken" in single[0] for single in singles)


def _splitter(directory: Path, content: dict[str, Any]) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a Llama checkpoint."""
    before = content.get("pre_tokenizer") or {}
    parts = before.get("pretokenizers", [before])
    kinds = [part.get("type") for part in parts]
    plain = bool(parts) and all(parts[-1].get(k) == v for k, v in _BYTE_LEVEL.items())
    if content.get("normalizer") is None and plain:
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
            return "smollm"
    if kinds == ["Split", "ByteLevel"] and parts[0]["pattern"].get("Regex") == _LLAMA3:
        return "llama-bpe"
    raise _unknown_tokenizer(directory, "its pre-tokenizer is not one of those that longrope knows")


def _unknown_tokenizer(directory: Path, why: str) -> ValueError:
    return ValueError(
        f"{directory}: longrope cannot convert its tokenizer to GGUF ({why}); {_CONVERT}"
    )
