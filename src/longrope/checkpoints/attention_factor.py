"""How engines come to the attention factor of an export: by themselves, a field, or the weights."""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from longrope.checkpoints.fold import largest_difference, tensor_names, why_not_foldable
from longrope.checkpoints.manifest import Manifest
from longrope.models.info import ModelInfo
from longrope.models.load import load_model
from longrope.rope.apply import rescaled
from longrope.rope.rescale import Rescale, default_attention_factor

log = logging.getLogger(__name__)
AttentionFactors = Literal["auto", "fold", "field"]
_SAME = 1e-6  # attention factors that engines compute are float32
# A folded model may differ by this share of what leaving the factor out would change.
_TOLERANCE = 0.1
_PROBE_TOKENS = 48
_FIELD = (
    "attention_factor %.6g is in fields that transformers and vLLM read; mlx-lm and SGLang compute "
    "%.6g by themselves"
)


def settled(manifest: Manifest, source: Path, how: AttentionFactors) -> Manifest:
    """Settle how engines that do not read ``attention_factor`` come to it.

    Raises:
        ValueError: it is to be folded, and the weights cannot take it.
    """
    ours, theirs = manifest.pair.long.attention_factor, _of_engines(manifest)
    if abs(ours - theirs) < _SAME:
        return manifest
    if how == "field":
        log.warning(_FIELD, ours, theirs)
        return manifest
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    layers = config.get("text_config", config)["num_hidden_layers"]
    reason = why_not_foldable(tensor_names(source), layers)
    if reason is None:
        return dataclasses.replace(manifest, folded=theirs)
    return unfolded(manifest, how, reason)


def unfolded(manifest: Manifest, how: AttentionFactors, reason: str) -> Manifest:
    """The same in fields of the config, where folding does not work.

    Raises:
        ValueError: it is to be folded.
    """
    if how == "fold":
        raise ValueError(
            f"--attention-factors fold: {manifest.source} cannot take it: {reason}; use field"
        )
    factors = manifest.pair.long.attention_factor, _of_engines(manifest)
    log.warning(f"{_FIELD}; it cannot be folded into the weights: %s", *factors, reason)
    return dataclasses.replace(manifest, folded=None)


def _of_engines(manifest: Manifest) -> float:
    """The attention factor that engines compute by themselves."""
    pair = manifest.written
    return default_attention_factor(pair.recovery_length, pair.long.max_position_embeddings)


class FoldedWrong(ValueError):
    """The factor in the query projections does not do what it does at cosines and sines."""


def folding_check(
    manifest: Manifest, source: Path, info: ModelInfo, trust_remote_code: bool
) -> Callable[[Path], None]:
    """Return a check of folded weights against the model's logits.

    The difference must be small beside that of dropping the attention factor. Both models are
    loaded once, one after the other.

    Args:
        source: the checkpoint before the export.
        info: of the model.

    Returns:
        A function of the exported directory, which raises :class:`FoldedWrong`.
    """

    def logits(model: Path, *rescales: Rescale) -> list[torch.Tensor]:
        loaded = load_model(
            str(model),
            info=dataclasses.replace(info, source=str(model), replaces_scaling=True),
            device="cpu",  # in float32 a large model may fit no GPU
            dtype="float32",
            trust_remote_code=trust_remote_code,
        )
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, info.vocabulary, (1, _PROBE_TOKENS), generator=generator)
        found = []
        for rescale in rescales:
            with torch.inference_mode(), rescaled(loaded.model, rescale):
                found.append(loaded.model(input_ids=ids).logits)
        return found

    def check(directory: Path) -> None:
        long, folded = manifest.pair.long, manifest.written.long
        expected, without = logits(source, long, folded)
        dropped = largest_difference(without, expected)
        found = largest_difference(logits(directory, folded)[0], expected)
        if found > _TOLERANCE * dropped:
            raise FoldedWrong(
                f"log-probabilities then change by {found:.3g}, and by {dropped:.3g} without the "
                "attention factor (layers without RoPE, or rounding of the weights)"
            )
        log.info("folded attention factor: largest difference %.3g nats", found)

    return check
