"""Passkey and needle-in-a-haystack retrieval.

The passkey prompt is that of the LongRoPE paper (section 4.2); the needle prompt hides a sentence
between lines of documents. Lengths count tokens of prompt and answer. An answer is correct when
greedy decoding gives every digit. One forward pass over prompt and answer decides that, without a
KV cache.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from itertools import pairwise

import numpy as np
import torch

from longrope.data.prompts import Prompt, depths
from longrope.layerwise.forward import BATCH_TOKENS, Continuation, LongForward
from longrope.rope.apply import rescaled
from longrope.rope.rescale import Rescale


@dataclasses.dataclass(frozen=True)
class RetrievalRow:
    """Retrieval result: correct answers at one length and range of depths.

    Args:
        length: tokens of prompt and answer.
        depth: middle of the range, 0 (start) to 1 (end).
        correct: trials with a correct answer.
        trials: all trials.
    """

    length: int
    depth: float
    correct: int
    trials: int


def retrieve(
    forward: LongForward,
    make: Callable[[int, float, random.Random], Prompt],
    length: int,
    rescale: Rescale | None,
    *,
    trials: int,
    bins: int = 10,
    seed: int = 0,
    answered: MutableMapping[str, bool] | None = None,
) -> list[RetrievalRow]:
    """Run retrieval trials at one length, with stratified depths.

    Args:
        make: returns the prompt for a length, a depth and a random generator.
        length: tokens of prompt and answer.
        rescale: factors to run under; None leaves the model as it is.
        bins: ranges of depths that trials are counted in.
        seed: random seed; the same seed gives every rescale the same prompts.
        answered: whether the answer was correct, by trial number; trials in it are skipped, new
            ones are added.
    """
    answered = {} if answered is None else answered
    rng = random.Random(f"{seed} {length}")
    prompts = [make(length, depth, rng) for depth in depths(trials, rng)]
    left = [number for number in range(trials) if str(number) not in answered]
    with rescaled(forward.model, rescale):
        for batch in _batches([prompts[number] for number in left]):
            for correct in _correct(forward, batch):
                answered[str(left.pop(0))] = correct
    rows = []
    edges = np.linspace(0, 1, min(bins, trials) + 1)
    for low, high in pairwise(edges.tolist()):
        inside = [
            answered[str(number)]
            for number, prompt in enumerate(prompts)
            if low <= prompt.depth < high
        ]
        rows.append(RetrievalRow(length, round((low + high) / 2, 4), sum(inside), len(inside)))
    return rows


def _batches(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    """Batch neighbouring retrieval prompts of equal shape, up to the token limit of a batch."""
    batch: list[Prompt] = []
    for prompt in prompts:
        alike = batch and (
            len(batch[0].ids) == len(prompt.ids)
            and batch[0].answer_tokens == prompt.answer_tokens
            and (len(batch) + 1) * len(prompt.ids) <= BATCH_TOKENS
        )
        if batch and not alike:
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def _correct(forward: LongForward, prompts: Sequence[Prompt]) -> list[bool]:
    ids = torch.from_numpy(np.stack([prompt.ids for prompt in prompts]))
    first = ids.shape[1] - prompts[0].answer_tokens
    asked = [Continuation(row, first, tokens[first:]) for row, tokens in enumerate(ids.tolist())]
    return [answer.greedy for answer in forward.score(ids[:, :-1], asked)]
