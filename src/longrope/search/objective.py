"""What the search minimises: the mean loss of the search windows under a candidate."""

import math

import numpy as np
import torch

from longrope.forward import LongForward
from longrope.rope.install import installed
from longrope.rope.rescale import Rescale


class Perplexity:
    """Mean negative log-likelihood in nats per token (the log of perplexity).

    Args:
        forward: the model's long forward.
        windows: token ids, shape (windows, tokens), all of one length.
    """

    def __init__(self, forward: LongForward, windows: np.ndarray):
        self.forward = forward
        self.windows = windows

    def __call__(self, rescale: Rescale) -> float:
        """The loss; NaN or infinite where the model's losses are."""
        total, count = 0.0, 0
        with installed(self.forward.model, rescale):
            for losses in self.forward.batches(self.windows):
                total += losses.sum(dtype=torch.float64).item()
                count += losses.numel()
        return total / count if math.isfinite(total) else math.nan
