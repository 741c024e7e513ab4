"""Write Hugging Face checkpoints that transformers, vLLM, SGLang and mlx-lm load with factors."""

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from longrope.checkpoints import card
from longrope.checkpoints.fold import fold_attention_factor
from longrope.checkpoints.manifest import Manifest
from longrope.files.atomic import atomic_directory, copy_file
from longrope.files.parse import read_json
from longrope.models.config_check import BLOCKS
from longrope.models.load import LoadedModel
from longrope.models.meta import build_meta_model
from longrope.models.parameters import is_tied
from longrope.models.sources import read_pretrained
from longrope.models.weights import (
    INDEX,
    SINGLE,
    file_inside,
    has_own_head,
    head_and_embeddings,
    weight_files,
)
from longrope.progress import quiet
from longrope.rope.pair import RescalePair
from longrope.rope.parameters import kept_parameters
from longrope.rope.rescale import UNROTATED, default_attention_factor
from longrope.rope.rotary import find_rotary, unscaled_parameters

# Files of a checkpoint beside its weights: configs, tokenizer, chat template, licence.
_KEPT = re.compile(
    r"config\.json|generation_config\.json|\w*processor_config\.json|\w*quant(ize)?_config\.json"
    r"|chat_template\.json|.*\.jinja|special_tokens_map\.json|added_tokens\.json|tekken\.json"
    r"|tokenizer.*\.(json|txt)|(vocab|merges|dict).*\.(json|txt|bpe)|(.*\.)?tokenizer\.model.*"
    r"|.*\.(model|tiktoken|spm)|(LICEN[CS]E|NOTICE|USE_POLICY).*",
    re.IGNORECASE,
)
_FULL, _TIED = "full_attention", "tie_word_embeddings"
# Version 4 of transformers, and the model's own code, demand a ``rope_scaling`` of three keys, and
# compute the attention factor. If it is another one, the full set makes them refuse the export.
_THREE_KEYS = {"phi3"}
# In these ``rope_scaling`` is that of full attention, in version 4 and in version 5.
_FULL_IS_SCALED = {"gemma3_text", "olmo3"}
# Fields that hold the length that a model was made for.
_LENGTHS = {
    *("max_position_embeddings", "n_positions", "n_ctx", "max_length", "model_max_length"),
    *("max_sequence_length", "max_seq_length", "max_seq_len", "seq_length", "seq_len"),
    *("max_context_length", "context_length", "max_model_len"),
}
# Parts of a model that no text passes through.
_OTHER_PARTS = re.compile(r"vision|visual|audio|image|video|speech|tower|encoder")
# Scaling beside RoPE's own parameters: transformers ignores it, and other engines apply it.
_OTHER_SCALING = {"dual_chunk_attention_config", "use_dynamic_ntk", "use_logn_attn"}
# What transformers writes about the machine that a tokenizer was saved on.
_OF_THE_MACHINE = {
    *("local_files_only", "is_local", "name_or_path", "cache_dir", "token", "use_auth_token"),
    *("tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file"),
}


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
    factor = long.attention_factor
    engines = {"type": "longrope", "short_mscale": factor, "long_mscale": factor}
    scaling = longrope | engines
    if known.model_type in _THREE_KEYS and math.isclose(
        factor, default_attention_factor(boundary, long.max_position_embeddings)
    ):
        scaling = {key: scaling[key] for key in ("type", "short_factor", "long_factor")}
    version4 = {"rope_scaling": scaling, "rope_theta": long.rope_theta}
    if _FULL not in rope:
        changed |= {"rope_parameters": longrope} | version4
    else:
        changed["rope_parameters"] = rope | {_FULL: longrope}
        # Version 5 would let that of version 4 override the above.
        text = {key: value for key, value in text.items() if key != "rope_scaling"}
        if known.model_type in _FULL_IS_SCALED:
            changed |= version4 | {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
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
        _finish(directory, manifest, site.module.config, is_tied(loaded.model))


def export_directory(
    source: Path,
    manifest: Manifest,
    path: Path,
    *,
    results: dict[str, Any] | None = None,
    check: Callable[[Path], None] | None = None,
    hard_links: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write a Hugging Face checkpoint from another one's configs, tokenizer and safetensors.

    Other files of the directory are left behind.

    Args:
        results: content of a run's ``results.json``, for the model card.
        check: called with the complete directory before it replaces ``path``; raises to refuse it.
        hard_links: link the weight files, where the disk is the same, instead of copying them.
            Whatever writes into one of them then changes the other checkpoint too.

    Raises:
        ValueError: there are no safetensors, a file leads outside the directory, a config cannot
            express the pair, or the query projections cannot take the attention factor (with
            ``manifest.folded``).
    """
    require_portable(manifest.pair)
    with quiet():
        config = read_pretrained(AutoConfig, str(source), trust_remote_code)
    tied = _is_tied(source, config, trust_remote_code)
    kept = kept_files(source)
    with atomic_directory(path) as directory:

        def place(file: Path) -> Path:
            target = directory / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            return target

        for file in kept:
            copy_file(file, place(file))
        weights: Callable[[Path, Path], None] = _link if hard_links else copy_file
        if manifest.folded is not None:
            factor = manifest.pair.long.attention_factor / manifest.folded
            weights = fold_attention_factor(source, config.get_text_config(), factor**2)
        for file in weight_files(source):
            weights(file.resolve(), place(file))
        _finish(directory, manifest, config.get_text_config(), tied, results)
        if check is not None:
            check(directory)


def kept_files(source: Path) -> list[Path]:
    """List the files of a checkpoint that belong to it beside its weights, for an export.

    Code is among them only where a config names it.

    Raises:
        ValueError: one is a symbolic link that leads outside the directory.
    """
    files = [file for file in sorted(source.iterdir()) if file.is_file()]
    kept = [file_inside(source, file.name) for file in files if _KEPT.fullmatch(file.name)]
    templates = sorted(source.glob("additional_chat_templates/*.jinja"))
    kept += [file_inside(source, str(file.relative_to(source))) for file in templates]
    if any("auto_map" in read_json(file) for file in kept if file.name.endswith("config.json")):
        kept += [file_inside(source, file.name) for file in files if file.suffix == ".py"]
    if not (source / SINGLE).exists():
        kept.append(file_inside(source, INDEX))
    return kept


def _is_tied(source: Path, config: Any, trust_remote_code: bool) -> bool:
    """Return whether a checkpoint's output head is its embeddings; the weights decide."""
    if not any(
        getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config())
    ):
        return False
    model = build_meta_model(str(source), config, trust_remote_code)[0]
    return not has_own_head(source, head_and_embeddings(model))


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


def _finish(
    directory: Path,
    manifest: Manifest,
    known: Any,
    tied: bool,
    results: dict[str, Any] | None = None,
) -> None:
    """Complete a Hugging Face checkpoint: config, lengths, manifest, model card."""
    long = manifest.pair.long
    before = {
        getattr(known, "max_position_embeddings", None),
        long.original_max_position_embeddings,
    }

    def lengthened(content: Any) -> Any:
        return _lengthened(content, before, long.max_position_embeddings)

    def changed(config: dict[str, Any]) -> dict[str, Any]:
        config = _weights_decide(_without(config, _OTHER_SCALING), tied)
        return scaled_config(lengthened(config), manifest.written, known)

    _edit(directory / "config.json", changed)
    _edit(directory / "generation_config.json", lengthened)
    _edit(
        directory / "tokenizer_config.json",
        lambda found: _readable_tokenizer(lengthened(found), long.max_position_embeddings),
    )
    # tokenizers truncates to a length of its own
    _edit(
        directory / "tokenizer.json",
        lambda found: found | {"truncation": None} if found.get("truncation") else found,
    )
    manifest.save(directory)
    (directory / "README.md").write_text(card.model_card(manifest, results), encoding="utf-8")


def _lengthened(content: Any, before: set[int | None], longest: int) -> Any:
    """Replace the old lengths in a config, nested ones included, by the longest."""
    if isinstance(content, list):
        return [_lengthened(value, before, longest) for value in content]
    if not isinstance(content, dict):
        return content
    return {
        key: longest
        if key in _LENGTHS and type(value) is int and value in before
        else value
        if _OTHER_PARTS.search(key)
        else _lengthened(value, before, longest)
        for key, value in content.items()
    }


def _without(content: Any, keys: set[str]) -> Any:
    """Return a config, nested ones included, without some keys."""
    if isinstance(content, dict):
        return {key: _without(value, keys) for key, value in content.items() if key not in keys}
    return content


def _weights_decide(config: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Return a config whose ``tie_word_embeddings`` is false if the weights have a head."""
    text = config.get("text_config", {})
    if tied or not (config.get(_TIED, True) or text.get(_TIED, True)):
        return config
    config = config | {_TIED: False}
    return config | {"text_config": text | {_TIED: False}} if text else config


def _readable_tokenizer(config: dict[str, Any], longest: int) -> dict[str, Any]:
    config = {key: value for key, value in config.items() if key not in _OF_THE_MACHINE}
    changed: dict[str, Any] = {"model_max_length": longest}
    if config.get("tokenizer_class") == "TokenizersBackend":  # only transformers 5 has this class
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    return config | changed


def _edit(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if not file.exists():
        return
    found = read_json(file)
    changed = change(found)
    if changed != found:
        text = json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
        file.write_text(text, encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        copy_file(source, target)
