"""Write Hugging Face checkpoints that transformers, vLLM, SGLang and mlx-lm load with factors."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from longrope.checkpoints import card
from longrope.checkpoints.fold import fold_attention_factor
from longrope.checkpoints.manifest import Manifest
from longrope.files import atomic_directory
from longrope.models.config_check import BLOCKS
from longrope.models.load import LoadedModel
from longrope.models.sources import read_pretrained, weight_files
from longrope.progress import quiet
from longrope.rope.pair import RescalePair
from longrope.rope.parameters import kept_parameters
from longrope.rope.rescale import UNROTATED
from longrope.rope.rotary import find_rotary, unscaled_parameters

# Files of a checkpoint beside its weights; pickled and other weights are not copied.
_KEPT = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
_FULL = "full_attention"


def scaled_config(config: dict[str, Any], pair: RescalePair, known: Any) -> dict[str, Any]:
    """Return the Hugging Face ``config.json`` with a pair of factors, for transformers 4 and 5.

    Version 5 reads ``rope_parameters``; version 4, vLLM and mlx-lm ``rope_scaling``, and the
    boundary from the top level too. Short factors apply iff the length is at most
    ``original_max_position_embeddings``, which is the recovery length. vLLM and SGLang read the
    attention factor from ``short_mscale`` and ``long_mscale``, transformers from
    ``attention_factor``.

    Args:
        config: the content of ``config.json`` before the export.
        known: the text model's config in transformers 5. Where its ``rope_parameters`` have a
            set per layer type, only full attention is scaled.
    """
    long, rope = pair.long, known.rope_parameters
    text, whole = config.get("text_config", config), "text_config" not in config
    own = rope.get(_FULL, rope)
    boundary, longrope = pair.recovery_length, _longrope(pair, own)
    named = known.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    changed: dict[str, Any] = {
        named: long.max_position_embeddings,
        "original_max_position_embeddings": boundary,
    }
    if _FULL in rope:
        changed["rope_parameters"] = rope | {_FULL: longrope}
        # Written by version 4; version 5 would let it override the above.
        text = {key: value for key, value in text.items() if key != "rope_scaling"}
    else:
        factor = long.attention_factor
        engines = {"type": "longrope", "short_mscale": factor, "long_mscale": factor}
        changed |= {
            "rope_parameters": longrope,
            "rope_scaling": longrope | engines,
            "rope_theta": long.rope_theta,
        }
    # transformers' longrope reads head_dim, which Mixtral leaves out and Gemma 4 has several of.
    if known.to_dict().get("head_dim", 0) is None:
        changed["head_dim"] = known.hidden_size // known.num_attention_heads
    if getattr(known, "is_heterogeneous", False):
        changed["allow_global_per_layer_attribute_access"] = True
    if "dtype" in text:  # as older versions call it
        changed["torch_dtype"] = text["dtype"]
    if whole:
        return text | changed
    rest = {key: value for key, value in config.items() if key not in BLOCKS}
    return rest | {"text_config": text | changed}


def _longrope(pair: RescalePair, own: dict[str, Any]) -> dict[str, Any]:
    """Return the exported ``rope_parameters``: both sets of factors, and the model's other keys."""
    return kept_parameters(own) | {
        "rope_type": "longrope",
        "rope_theta": pair.long.rope_theta,
        "short_factor": _written(pair.short.factors, own),
        "long_factor": _written(pair.long.factors, own),
        "original_max_position_embeddings": pair.recovery_length,
        "factor": pair.long.max_position_embeddings / pair.recovery_length,
        "attention_factor": pair.long.attention_factor,
    }


def _written(factors: Sequence[float], rope: dict[str, Any]) -> list[float]:
    """Return factors for a Hugging Face config: huge in dimensions that are not rotated."""
    plain = unscaled_parameters(rope)
    if plain["rope_type"] != "proportional":
        return list(factors)
    count = int(plain["partial_rotary_factor"] * len(factors))
    return [*factors[:count], *[UNROTATED] * (len(factors) - count)]


def export_model(loaded: LoadedModel, manifest: Manifest, path: Path) -> None:
    """Write a model in memory as a Hugging Face checkpoint with both sets of factors.

    Raises:
        ValueError: a config cannot express the pair, or the directory cannot be written.
    """
    require_portable(manifest.pair)
    site = find_rotary(loaded.model)
    assert site is not None
    with atomic_directory(path) as directory, quiet():
        loaded.model.save_pretrained(directory)
        loaded.tokenizer.save_pretrained(directory)
        _finish(directory, manifest, site.module.config)


def export_directory(
    source: Path,
    manifest: Manifest,
    path: Path,
    *,
    check: Callable[[Path], None] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write a Hugging Face checkpoint from another; weights are hard links unless folded.

    Args:
        check: called with the complete directory before it replaces ``path``; raises to refuse it.

    Raises:
        ValueError: there are no safetensors, a config cannot express the pair, or the query
            projections cannot take the attention factor (with ``manifest.folded``).
    """
    require_portable(manifest.pair)
    files = weight_files(source)
    with quiet():
        config = read_pretrained(AutoConfig, str(source), trust_remote_code)
    with atomic_directory(path) as directory:
        for file in source.iterdir():
            if file.is_file() and file.suffix in _KEPT:
                shutil.copyfile(file, directory / file.name)
        weights: Callable[[Path, Path], None] = _link
        if manifest.folded is not None:
            factor = manifest.pair.long.attention_factor / manifest.folded
            weights = fold_attention_factor(source, config.get_text_config(), factor**2)
        for file in files:
            weights(file.resolve(), directory / file.name)
        _finish(directory, manifest, config.get_text_config())
        if check is not None:
            check(directory)


def require_portable(pair: RescalePair) -> None:
    """Refuse a pair that no Hugging Face checkpoint can express.

    Raises:
        ValueError: n̂ > 0, or an attention factor that differs between the two.
    """
    if not (pair.short.portable and pair.long.portable):
        raise ValueError(
            f"start_tokens is {max(pair.short.start_tokens, pair.long.start_tokens)}, and no "
            "checkpoint format has a field for it; extend with start_tokens 0"
        )
    if pair.short.attention_factor != pair.long.attention_factor:
        raise ValueError(
            f"attention_factor is {pair.short.attention_factor:g} (short) and "
            f"{pair.long.attention_factor:g} (long), but a checkpoint has one for both; make them "
            "equal"
        )


def _finish(directory: Path, manifest: Manifest, known: Any) -> None:
    """Complete a Hugging Face checkpoint: config, tokenizer length, manifest, model card."""
    _edit(directory / "config.json", lambda config: scaled_config(config, manifest.written, known))
    longest = manifest.pair.long.max_position_embeddings
    _edit(directory / "tokenizer_config.json", lambda found: _readable_tokenizer(found, longest))
    manifest.save(directory)
    (directory / "README.md").write_text(card.model_card(manifest), encoding="utf-8")


def _readable_tokenizer(config: dict[str, Any], longest: int) -> dict[str, Any]:
    changed: dict[str, Any] = {"model_max_length": longest}
    if config.get("tokenizer_class") == "TokenizersBackend":  # only transformers 5 has this class
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    return config | changed


def _edit(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(change(found), indent=2) + "\n", encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
