"""Choose the short-context rescale of an extended model."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from longrope.layerwise.forward import LongForward
from longrope.rope.rescale import Rescale
from longrope.search.objective import Objective


@dataclasses.dataclass(frozen=True)
class Choice:
    """Choice of a recovery: the short-context rescale, and its losses in nats per token.

    Args:
        short: the chosen rescale.
        losses: for each recovery length, the loss at every short length. Sequences beyond the
            recovery length use the long rescale.
        without: the losses of the long rescale alone.
        shared: loss of the chosen rescale under the attention factor that a checkpoint shares
            between both rescales.
        free: its loss under an attention factor of its own (``short_attention_factor``, where
            that loss is lower).
        free_attention_factor: that attention factor.
    """

    short: Rescale
    losses: dict[int, dict[int, float]]
    without: dict[int, float]
    shared: float
    free: float
    free_attention_factor: float
    short_attention_factor: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "recovery_length": self.short.max_position_embeddings,
            "losses": self.losses,
            "without": self.without,
            "shared": self.shared,
            "free": self.free,
            "free_attention_factor": self.free_attention_factor,
            "short_attention_factor": self.short_attention_factor,
        }


def choose(
    forward: LongForward,
    windows: dict[int, np.ndarray],
    candidates: Sequence[Rescale],
    long: Rescale,
    *,
    free_attention_factor: float,
) -> Choice:
    """Choose the short-context rescale with the lowest mean loss over all recovery lengths.

    Each candidate is used up to its recovery length and the long rescale beyond it. All candidates
    are compared on the same windows, because longer windows have lower losses under any factors.

    Args:
        windows: for each short length, token ids of shape (windows, tokens).
    """

    def loss(rescale: Rescale, length: int) -> float:
        return Objective(forward, list(windows[length]))(rescale).loss

    without = {length: loss(long, length) for length in windows}
    losses = {
        candidate.max_position_embeddings: {
            length: loss(candidate, length)
            if length <= candidate.max_position_embeddings
            else without[length]
            for length in windows
        }
        for candidate in candidates
    }
    best = min(
        candidates, key=lambda c: float(np.mean(list(losses[c.max_position_embeddings].values())))
    )
    length = best.max_position_embeddings
    free = loss(best.replace(attention_factor=free_attention_factor), length)
    shared = losses[length][length]
    applied = None
    if free < shared:  # for longrope's runtime alone: a checkpoint has no field for it
        applied = free_attention_factor
    return Choice(best, losses, without, shared, free, free_attention_factor, applied)
