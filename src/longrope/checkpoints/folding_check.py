"""Fold the attention factor of an export into its weights, and check the result."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from longrope.checkpoints.fold import largest_difference, why_not_foldable
from longrope.checkpoints.manifest import Manifest
from longrope.execution import ExecutionConfig
from longrope.files.parse import read_json
from longrope.models.info import ModelInfo
from longrope.models.load import load_model
from longrope.models.weights import stored_tensors
from longrope.rope.apply import rescaled
from longrope.rope.rescale import Rescale

log = logging.getLogger(__name__)
_SAME = 1e-6  # engines compute the attention factor in float32
# The largest difference of folded weights, as a share of that without the attention factor.
_TOLERANCE = 0.1
_PROBE_TOKENS = 48


def needs_folding(manifest: Manifest) -> bool:
    """Return whether engines by themselves compute another attention factor than the export's."""
    ours = manifest.pair.long.attention_factor
    return abs(ours - manifest.computed_attention_factor) >= _SAME


def with_folding(manifest: Manifest, source: Path) -> Manifest:
    """Mark an export's attention factor to be folded into its weights, where engines need it.

    Returns:
        The manifest with ``folded`` set, or unchanged where nothing needs folding.

    Raises:
        ValueError: it cannot be folded into the weights of ``source``; the message says why.
    """
    if not needs_folding(manifest):
        return manifest
    config = read_json(source / "config.json")
    layers = config.get("text_config", config)["num_hidden_layers"]
    reason = why_not_foldable([name for name, _ in stored_tensors(source)], layers)
    if reason is not None:
        raise _cannot_fold(manifest, reason)
    return dataclasses.replace(manifest, folded=manifest.computed_attention_factor)


def _cannot_fold(manifest: Manifest, reason: str) -> ValueError:
    return ValueError(
        f"fold_attention_factor=True is not possible for {manifest.source}: {reason}; leave it out"
    )


def folding_check(
    manifest: Manifest, source: Path, info: ModelInfo, trust_remote_code: bool
) -> Callable[[Path], None]:
    """Return a check that folding the attention factor of an export does not change its logits.

    The difference must be small beside that of dropping the attention factor. Both models are
    loaded once, one after the other.

    Args:
        source: the checkpoint before the export.
        info: the model's properties.

    Returns:
        A function of the exported directory, which raises ValueError where the check fails.
    """

    def logits(model: Path, *rescales: Rescale) -> list[torch.Tensor]:
        loaded = load_model(
            str(model),
            # in float32 a large model may fit no GPU
            ExecutionConfig(device="cpu", dtype="float32", trust_remote_code=trust_remote_code),
            info=dataclasses.replace(info, source=str(model), replaces_scaling=True),
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
            raise _cannot_fold(
                manifest,
                f"it changes log-probabilities by {found:.3g} nats (dropping the attention factor "
                f"changes them by {dropped:.3g}), because of layers without RoPE or rounding",
            )
        log.info("folded attention factor: largest difference %.3g nats", found)

    return check
