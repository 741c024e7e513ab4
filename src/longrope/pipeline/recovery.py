"""Which of two short sets of factors an extended model is given."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from longrope.layerwise.forward import LongForward
from longrope.rope.rescale import Rescale
from longrope.search.objective import Objective


@dataclasses.dataclass(frozen=True)
class Choice:
    """The short set that was chosen, and the losses (nats per token) that decided.

    ``losses`` has for each recovery length the loss at every short length, where a
    sequence beyond the recovery length gets the long set; ``without`` those of the long
    set alone. ``free`` is the loss of the chosen set at its length under an attention
    factor of its own (``short_attention_factor``, where that loss is lower), ``shared``
    under the one that a checkpoint has for both.
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
    """The candidate with the lower mean loss over all the short lengths.

    Each recovery length is judged by what its model would do: sequences up to it under its
    set, longer ones under the long set. (Mean losses of two window lengths alone cannot be
    compared: longer windows have lower losses whatever the factors.)

    Args:
        windows: for each short length, token ids of shape (windows, tokens).
    """

    def loss(rescale: Rescale, length: int) -> float:
        return Objective(forward, windows[length])(rescale).loss

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
