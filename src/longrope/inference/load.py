"""Load an extended model together with its pair of rescales."""

import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import Any

from longrope.checkpoints.gguf import read_pair
from longrope.checkpoints.importer import find_pair
from longrope.checkpoints.manifest import Manifest
from longrope.checkpoints.run_directory import is_run
from longrope.execution import ExecutionConfig
from longrope.models.info import FOLDED, ModelInfo, ScalingChoice, inspect_model
from longrope.models.load import LoadedModel, load_model
from longrope.rope.pair import RescalePair
from longrope.rope.rescale import Rescale

log = logging.getLogger(__name__)


def load_extended(
    source: str,
    execution: ExecutionConfig | None = None,
    *,
    rope_scaling: ScalingChoice | None = None,
    original_length: int | None = None,
) -> tuple[LoadedModel, RescalePair | None]:
    """Load an extended model together with its pair of factors.

    Args:
        source: a run of ``longrope extend``, a checkpoint with ``longrope`` scaling, or
            any other model, which has no pair.
        execution: as in :func:`longrope.models.load.load_model`.
        rope_scaling: if given, the model is loaded with this choice and without a pair.
        original_length: as in :func:`longrope.models.info.inspect_model`.

    Raises:
        ValueError: no such model, or one that cannot be rescaled.
    """
    execution = execution or ExecutionConfig()
    info, pair = inspect_extended(
        source,
        rope_scaling=rope_scaling,
        original_length=original_length,
        trust_remote_code=execution.trust_remote_code,
    )
    return load_model(info.source, execution, info=info), pair


def inspect_extended(
    source: str,
    *,
    rope_scaling: ScalingChoice | None = None,
    original_length: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[ModelInfo, RescalePair | None]:
    """Inspect an extended model before it is loaded, and read its pair of factors.

    The arguments are those of :func:`load_extended`.

    Returns:
        The model's info, whose ``source`` is the checkpoint to load, and the pair if there is one.

    Raises:
        ValueError: no such model, or files that cannot be read.
    """
    pair, run = None, Path(source)
    if not rope_scaling:
        pair = find_pair(source, trust_remote_code)
    if pair is not None:
        rope_scaling = "replace"
        # The checkpoint's own original length is the recovery length, where its long factors begin.
        original_length = original_length or _original_length(run, pair)
        if is_run(run):
            _warn_if_not_exported(run, pair)
    info = inspect_weights(
        source,
        rope_scaling=rope_scaling,
        original_length=original_length,
        trust_remote_code=trust_remote_code,
    )
    if pair is not None and info.reason == FOLDED:  # which the pair was written for
        info = dataclasses.replace(info, extendable=True, reason=None)
    return info, pair


def inspect_to_measure(
    source: str,
    *,
    rope_scaling: ScalingChoice | None = None,
    original_length: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[ModelInfo, RescalePair | None]:
    """Inspect a model to measure as it is: with its pair of factors, or its published scaling.

    Arguments and results are those of :func:`inspect_extended`.

    Raises:
        ValueError: no such model, or one that cannot be rescaled.
    """
    how: dict[str, Any] = {
        "original_length": original_length,
        "trust_remote_code": trust_remote_code,
    }
    info, pair = inspect_extended(source, rope_scaling=rope_scaling, **how)
    if pair is None and rope_scaling is None and info.rope_scaling:
        info = inspect_weights(source, rope_scaling="keep", **how)
    info.require_extendable()
    return info, pair


def _warn_if_not_exported(run: Path, pair: RescalePair) -> None:
    """Warn on loading a run with a short attention factor that its checkpoint cannot hold."""
    if pair.short_attention_factor is not None:
        log.warning(
            "up to %s tokens the attention factor is %.4g, which only longrope applies; the "
            "run's checkpoint, %s, has %.4g at every length",
            f"{pair.recovery_length:,}",
            pair.short_attention_factor,
            run / "model",
            pair.long.attention_factor,
        )


def inspect_weights(
    source: str,
    *,
    rope_scaling: ScalingChoice | None = None,
    original_length: int | None = None,
    trust_remote_code: bool = False,
) -> ModelInfo:
    """Inspect an extended model to load without its pair of factors.

    For a run this is its exported checkpoint, unscaled unless ``rope_scaling`` is ``keep``.

    Returns:
        The model's info, whose ``source`` is the checkpoint to load.

    Raises:
        ValueError: no such model, or files that cannot be read.
    """
    run = Path(source)
    if is_run(run):
        source = str(run / "model")
        if rope_scaling != "keep":
            before = Rescale.load(run / "rescale.json").original_max_position_embeddings
            rope_scaling, original_length = "replace", original_length or before
    return inspect_model(
        source,
        rope_scaling=rope_scaling,
        original_length=original_length,
        trust_remote_code=trust_remote_code,
    )


def _original_length(source: Path, pair: RescalePair) -> int:
    """Return the original length of an extended model to load, as far as its files tell."""
    if is_run(source):
        return pair.long.original_max_position_embeddings
    manifest = None
    if source.suffix == ".gguf":
        manifest = read_pair(source)[1]
    elif source.is_dir():
        with contextlib.suppress(ValueError):  # a damaged manifest, needed only for the length
            manifest = Manifest.load(source)
    known = manifest.pair if manifest is not None and manifest.describes(pair) else pair
    return known.long.original_max_position_embeddings
