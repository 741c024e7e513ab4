"""What the search minimises: the loss of windows of text, and of answers, under a candidate."""

import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from longrope.data.prompts import Prompt, depths, passkey_prompt, require_room
from longrope.layerwise.backward import gradient
from longrope.layerwise.forward import LongForward
from longrope.rope.apply import rescaled
from longrope.rope.rescale import Rescale
from longrope.search.space import Outcome


class Objective:
    """Mean negative log-likelihood in nats per token (the log of perplexity).

    With questions, the mean loss of their answers' tokens is added: perplexity alone does
    not see whether a model still finds what stands far back (after LongRoPE2's
    needle-driven perplexity, which takes the answers alone).

    A part is one window, with its share of the questions.

    Args:
        forward: the model's long forward.
        windows: token ids, shape (windows, tokens), all of one length.
    """

    def __init__(self, forward: LongForward, windows: np.ndarray, questions: Sequence[Prompt] = ()):
        self.forward = forward
        self.windows = windows
        self.questions = questions

    def __call__(self, rescale: Rescale, part: int | None = None, slope: bool = False) -> Outcome:
        """The loss; NaN where the model's losses are not finite. And its slope, where asked for."""
        windows, questions, share = self.windows, list(self.questions), 1
        if part is not None:
            share = len(windows)
            windows, questions = windows[part : part + 1], questions[part::share]
        # Weighed so that the whole is the mean of its parts: by tokens, windows being equally long.
        answer_tokens = sum(question.answer_tokens for question in self.questions)
        weights = [share * q.answer_tokens / answer_tokens for q in questions]
        if slope:
            return self._slope(rescale, windows, questions, weights)
        with rescaled(self.forward.model, rescale):
            loss = _mean(self.forward.batches(windows))
            for question, weight in zip(questions, weights, strict=True):
                loss += weight * _mean([self._answer(question)])
        return Outcome(loss if math.isfinite(loss) else math.nan)

    def _answer(self, question: Prompt) -> torch.Tensor:
        ids = torch.from_numpy(question.ids)[None]
        return self.forward.losses(ids)[:, -question.answer_tokens :]

    def _slope(
        self,
        rescale: Rescale,
        windows: np.ndarray,
        questions: Sequence[Prompt],
        weights: Sequence[float],
    ) -> Outcome:
        loss, by_factor = 0.0, torch.zeros(len(rescale.factors), dtype=torch.float64)
        texts = [(ids, 0, 1 / len(windows)) for ids in windows]
        answers = [(q.ids, q.answer_tokens, w) for q, w in zip(questions, weights, strict=True)]
        with rescaled(self.forward.model, rescale, always=True):
            for ids, counted, weight in texts + answers:
                row = torch.from_numpy(np.asarray(ids, dtype=np.int64))[None]
                found = gradient(self.forward, row, counted)
                loss += weight * found.loss
                by_factor += weight * found.grad
        rotated = by_factor[: rescale.rotated].tolist()
        return Outcome(loss if math.isfinite(loss) else math.nan, tuple(rotated))


def passkey_questions(tokenizer: Any, length: int, count: int, seed: int) -> list[Prompt]:
    """Passkey prompts to search on; never those that an evaluation with this seed asks.

    Raises:
        ValueError: the length does not hold a question.
    """
    if count:
        require_room("passkey_prompts", tokenizer, length)
    rng = random.Random(f"{seed} search {length}")
    return [passkey_prompt(tokenizer, length, depth, rng) for depth in depths(count, rng)]


def _mean(batches: Iterable[torch.Tensor]) -> float:
    total, count = 0.0, 0
    for losses in batches:
        total += losses.sum(dtype=torch.float64).item()
        count += losses.numel()
    return total / count
