"""Retrieval: is a number that stands somewhere in a long text found again?

The passkey prompt is that of the LongRoPE paper (section 4.2); the needle hides a
sentence between the lines of real documents. Lengths are tokens of the model's own
tokenizer, the answer included. An answer counts when greedy decoding gives every
digit of it; that is read off one long forward over prompt and answer, which is the same
and needs no cache.
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
class Row:
    """How often the answer was right at a length and a range of depths around ``depth``."""

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
    report: Callable[[int], None] = lambda done: None,
    answered: MutableMapping[str, bool] | None = None,
) -> list[Row]:
    """Ask ``trials`` questions of one length, their depths stratified, under a rescale.

    ``make`` gives the prompt for a length, a depth and a random generator; the same
    seed asks every rescale the same questions. What is ``answered``, by its number, is not asked
    again, and what is asked is added to it.
    """
    answered = {} if answered is None else answered
    rng = random.Random(f"{seed} {length}")
    prompts = [make(length, depth, rng) for depth in depths(trials, rng)]
    left = [number for number in range(trials) if str(number) not in answered]
    with rescaled(forward.model, rescale):
        for batch in _batches([prompts[number] for number in left]):
            for right in _right(forward, batch):
                answered[str(left.pop(0))] = right
            report(trials - len(left))
    rows = []
    edges = np.linspace(0, 1, min(bins, trials) + 1)
    for low, high in pairwise(edges.tolist()):
        inside = [
            answered[str(number)]
            for number, prompt in enumerate(prompts)
            if low <= prompt.depth < high
        ]
        rows.append(Row(length, round((low + high) / 2, 4), sum(inside), len(inside)))
    return rows


def _batches(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    """Neighbours of equal shape together, up to what goes through a model at once."""
    waiting: list[Prompt] = []
    for prompt in prompts:
        alike = waiting and (
            len(waiting[0].ids) == len(prompt.ids)
            and waiting[0].answer_tokens == prompt.answer_tokens
            and (len(waiting) + 1) * len(prompt.ids) <= BATCH_TOKENS
        )
        if waiting and not alike:
            yield waiting
            waiting = []
        waiting.append(prompt)
    if waiting:
        yield waiting


def _right(forward: LongForward, prompts: Sequence[Prompt]) -> list[bool]:
    ids = torch.from_numpy(np.stack([prompt.ids for prompt in prompts]))
    first = ids.shape[1] - prompts[0].answer_tokens
    asked = [Continuation(row, first, tokens[first:]) for row, tokens in enumerate(ids.tolist())]
    return [answer.greedy for answer in forward.score(ids[:, :-1], asked)]
