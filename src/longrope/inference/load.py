"""Load an extended model together with its rescales."""

import contextlib
import logging
from pathlib import Path
from typing import Any

from longrope.checkpoints.gguf import read_pair
from longrope.checkpoints.importer import find_pair
from longrope.checkpoints.manifest import Manifest
from longrope.checkpoints.run_layout import is_run
from longrope.models.load import LoadedModel, load_model
from longrope.rope.pair import RescalePair
from longrope.rope.rescale import Rescale

log = logging.getLogger(__name__)


def load_extended(source: str, **options: Any) -> tuple[LoadedModel, RescalePair | None]:
    """A model and its pair of factors.

    Args:
        source: what ``longrope extend`` wrote, a checkpoint with ``longrope`` scaling, or
            any other model, which has no pair.
        options: as :func:`longrope.models.load.load_model` takes them. With ``existing_scaling``
            the model is taken as that says, without a pair.

    Raises:
        ValueError: no such model, or one that cannot be rescaled.
    """
    if options.get("existing_scaling"):
        return load_weights(source, **options), None
    pair, run = find_pair(source, options.get("trust_remote_code", False)), Path(source)
    if pair is None:
        return load_model(source, **options), None
    if is_run(run):
        _say_if_not_exported(run, pair)
    options |= {"existing_scaling": "replace"}
    # What the checkpoint calls original is the recovery length, where its long factors begin.
    options["original_length"] = options.get("original_length") or _original_length(run, pair)
    return load_model(str(run / "model") if is_run(run) else source, **options), pair


def _say_if_not_exported(run: Path, pair: RescalePair) -> None:
    """A checkpoint has one attention factor for both sets; a run may have found two."""
    exported = Rescale.load(run / "short.json").attention_factor
    if exported != pair.short.attention_factor:
        log.warning(
            "up to %s tokens the attention factor is %.4g, which the run found best and only "
            "longrope applies; its checkpoint, %s, has %.4g at every length",
            f"{pair.recovery_length:,}",
            pair.short.attention_factor,
            run / "model",
            exported,
        )


def load_weights(source: str, **options: Any) -> LoadedModel:
    """A model without its pair: of a run the trained weights, unscaled unless that is to be kept.

    Args:
        options: as :func:`longrope.models.load.load_model` takes them.
    """
    run = Path(source)
    if is_run(run):
        source = str(run / "model")
        if options.get("existing_scaling") != "keep":
            before = Rescale.load(run / "rescale.json").original_max_position_embeddings
            told = options.get("original_length") or before
            options |= {"existing_scaling": "replace", "original_length": told}
    return load_model(source, **options)


def _original_length(source: Path, pair: RescalePair) -> int:
    """Tokens that a model handled before it was extended, as far as what lies there tells."""
    if is_run(source):
        return pair.long.original_max_position_embeddings
    manifest = None
    if source.suffix == ".gguf":
        manifest = read_pair(source)[1]
    elif source.is_dir():
        with contextlib.suppress(ValueError):  # a note that is damaged, and only tells the length
            manifest = Manifest.load(source)
    known = manifest.pair if manifest is not None and manifest.describes(pair) else pair
    return known.long.original_max_position_embeddings
