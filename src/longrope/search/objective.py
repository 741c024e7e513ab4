"""The search objective: mean loss of text windows and of passkey answers."""

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from longrope.data.prompts import Prompt, depths, passkey_prompt, require_room
from longrope.layerwise.backward import gradient
from longrope.layerwise.forward import LongForward
from longrope.rope.apply import rescaled
from longrope.rope.rescale import Rescale
from longrope.search.space import Result


class Objective:
    """The objective of a search: mean loss of its windows in nats per token.

    With questions, the mean loss of their answer tokens is added: perplexity alone does not
    measure long-range retrieval (after LongRoPE2's needle-driven perplexity, which uses the
    answers alone).

    A single window is evaluated with its share of the questions.

    Args:
        forward: the model's long forward pass.
        windows: token ids of each window, shape (tokens,).
    """

    def __init__(
        self,
        forward: LongForward,
        windows: Sequence[np.ndarray],
        questions: Sequence[Prompt] = (),
    ):
        self.forward = forward
        self.windows = windows
        self.questions = questions

    def __call__(self, rescale: Rescale, window: int | None = None, grad: bool = False) -> Result:
        """Return the search objective of a rescale, NaN if not finite, and any requested gradient.

        The gradient is with respect to ln λ.
        """
        windows, questions, share = self.windows, list(self.questions), 1
        if window is not None:
            share = len(windows)
            windows, questions = windows[window : window + 1], questions[window::share]
        # Weighted by tokens, so that the loss on all windows is the mean of the single ones.
        answer_tokens = sum(question.answer_tokens for question in self.questions)
        weights = [share * q.answer_tokens / answer_tokens for q in questions]
        if grad:
            return self._gradient(rescale, windows, questions, weights)
        with rescaled(self.forward.model, rescale):
            losses = window_losses(self.forward, windows)
            for index, (question, weight) in enumerate(zip(questions, weights, strict=True)):
                (answer,) = _means([self._answer(question)])
                losses[index % len(losses)] += len(losses) * weight * float(answer)
        loss = sum(losses) / len(losses)
        each = tuple(losses) if window is None else ()
        return Result(loss if math.isfinite(loss) else math.nan, window_losses=each)

    def _answer(self, question: Prompt) -> torch.Tensor:
        ids = torch.from_numpy(question.ids)[None]
        return self.forward.losses(ids)[:, -question.answer_tokens :]

    def _gradient(
        self,
        rescale: Rescale,
        windows: Sequence[np.ndarray],
        questions: Sequence[Prompt],
        weights: Sequence[float],
    ) -> Result:
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
        return Result(loss if math.isfinite(loss) else math.nan, tuple(rotated))


def passkey_questions(tokenizer: Any, length: int, count: int, seed: int) -> list[Prompt]:
    """Return a search objective's passkey prompts, never those of an evaluation with this seed.

    Raises:
        ValueError: the length is too short for a question.
    """
    if count:
        require_room("`passkey_prompts`", tokenizer, length)
    rng = random.Random(f"{seed} search {length}")
    return [passkey_prompt(tokenizer, length, depth, rng) for depth in depths(count, rng)]


def window_losses(forward: LongForward, windows: Sequence[np.ndarray]) -> list[float]:
    """Return the mean loss of each search window; those of one length in a row share batches."""
    losses: list[float] = []
    for _, group in itertools.groupby(windows, key=len):
        losses += map(float, _means(forward.batches(np.stack(list(group)))))
    return losses


def _means(batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the mean loss of each window, in float64."""
    for losses in batches:
        yield from losses.mean(dim=1, dtype=torch.float64)
