"""What the search minimises: the loss of windows of text, and of answers, under a candidate."""

import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from longrope.evaluate.retrieval import Prompt, depths, passkey_prompt, require_room
from longrope.forward import LongForward
from longrope.rope.install import installed
from longrope.rope.rescale import Rescale


class Objective:
    """Mean negative log-likelihood in nats per token (the log of perplexity).

    With questions, the mean loss of their answers' tokens is added: perplexity alone does
    not see whether a model still finds what stands far back (after LongRoPE2's
    needle-driven perplexity, which takes the answers alone).

    Args:
        forward: the model's long forward.
        windows: token ids, shape (windows, tokens), all of one length.
    """

    def __init__(self, forward: LongForward, windows: np.ndarray, questions: Sequence[Prompt] = ()):
        self.forward = forward
        self.windows = windows
        self.questions = questions

    def __call__(self, rescale: Rescale) -> float:
        """The loss; NaN where the model's losses are not finite."""
        with installed(self.forward.model, rescale):
            loss = _mean(self.forward.batches(self.windows))
            if self.questions:
                loss += _mean(self._answer(question) for question in self.questions)
        return loss if math.isfinite(loss) else math.nan

    def _answer(self, question: Prompt) -> torch.Tensor:
        ids = torch.from_numpy(question.ids)[None]
        return self.forward.losses(ids)[:, -question.answer_tokens :]


def passkey_questions(tokenizer: Any, length: int, count: int, seed: int) -> list[Prompt]:
    """Passkey prompts to search on; never those that an evaluation with this seed asks.

    Raises:
        ValueError: the length does not hold a question.
    """
    if count:
        require_room("passkeys", tokenizer, length)
    rng = random.Random(f"{seed} search {length}")
    return [passkey_prompt(tokenizer, length, depth, rng) for depth in depths(count, rng)]


def _mean(batches: Iterable[torch.Tensor]) -> float:
    total, count = 0.0, 0
    for losses in batches:
        total += losses.sum(dtype=torch.float64).item()
        count += losses.numel()
    return total / count
