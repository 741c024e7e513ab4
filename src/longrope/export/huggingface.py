"""A directory that plain transformers loads, with the pair of factors in its config."""

import json
from pathlib import Path
from typing import Any

from longrope.files import whole_directory
from longrope.model import LoadedModel
from longrope.rope.install import find_rotary
from longrope.rope.switch import Pair
from longrope.source import quiet


def scaled_config(config: dict[str, Any], pair: Pair, layer_type: str | None) -> dict[str, Any]:
    """``config.json`` of a model with a pair of factors, as transformers 5 and 4 read it.

    Version 5 reads ``rope_parameters``; version 4 reads ``rope_scaling``, and the
    boundary from the top level only. Short applies iff the length is at most
    ``original_max_position_embeddings``, which is the recovery length.
    """
    short, long = pair.short, pair.long
    text = config.get("text_config", config)
    own = text.get("rope_parameters") or {}
    own = own if layer_type is None else own.get(layer_type, {})
    kept = {k: own[k] for k in ("partial_rotary_factor",) if k in own}
    longrope = {
        "rope_type": "longrope",
        "rope_theta": long.rope_theta,
        "short_factor": list(short.factors),
        "long_factor": list(long.factors),
        "original_max_position_embeddings": pair.recovery_length,
        "factor": long.max_position_embeddings / pair.recovery_length,
        "attention_factor": long.attention_factor,
    } | kept
    changed = {
        "max_position_embeddings": long.max_position_embeddings,
        "original_max_position_embeddings": pair.recovery_length,
    }
    if layer_type is None:
        changed |= {
            "rope_parameters": longrope,
            "rope_scaling": longrope | {"type": "longrope"},
            "rope_theta": long.rope_theta,
        }
    else:
        changed["rope_parameters"] = text["rope_parameters"] | {layer_type: longrope}
    if text is config:
        return config | changed
    return config | {"text_config": text | changed}


def export_model(loaded: LoadedModel, pair: Pair, path: Path) -> None:
    """Write weights, tokenizer and a config with both sets of factors.

    Raises:
        ValueError: n̂ > 0, or an attention factor that differs between the two, neither of
            which a config can say; or the directory cannot be written.
    """
    if not (pair.short.portable and pair.long.portable):
        raise ValueError(
            f"start_tokens is {max(pair.short.start_tokens, pair.long.start_tokens)}; no "
            "checkpoint format has a field for it: extend with start_tokens 0"
        )
    if pair.short.attention_factor != pair.long.attention_factor:
        raise ValueError(
            f"attention_factor is {pair.short.attention_factor:g} (short) and "
            f"{pair.long.attention_factor:g} (long); a checkpoint holds one for both"
        )
    site = find_rotary(loaded.model)
    assert site is not None
    with whole_directory(path) as directory, quiet():
        loaded.model.save_pretrained(directory)
        loaded.tokenizer.model_max_length = pair.long.max_position_embeddings
        loaded.tokenizer.save_pretrained(directory)
        file = directory / "config.json"
        config = scaled_config(json.loads(file.read_text()), pair, site.layer_type)
        file.write_text(json.dumps(config, indent=2) + "\n")
