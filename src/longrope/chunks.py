"""The chunks of a sequence, in order; and where several processes share it, which are whose."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from longrope.parallel import Team


class Chunk(NamedTuple):
    """A stretch of the sequence, and where its hidden states are among this process's."""

    span: slice
    place: slice


class Chunks:
    """A sequence of so many tokens in chunks of at most ``size``.

    A team goes through them in rounds, a chunk for each process. So the processes have as many
    chunks, and as much attention but for one chunk of keys a round; that this be little, the chunks
    of a shared sequence are of one length, but for a token. A sequence of fewer tokens than
    processes is not shared: each has it all.
    """

    def __init__(self, tokens: int, size: int, team: Team):
        self.tokens = tokens
        self.team = team if tokens >= team.size else Team()
        members = self.team.size
        if members == 1:
            starts = [*range(0, tokens, size), tokens]
        else:
            count = min(-(-tokens // (size * members)), tokens // members) * members
            starts = [tokens * i // count for i in range(count + 1)]
        self.spans = [slice(a, b) for a, b in itertools.pairwise(starts)]

    def own(self, size: int | None = None) -> list[Chunk]:
        """This process's chunks, in order; in pieces of at most ``size`` where given."""
        found, place = [], 0
        for span in self.spans[self.team.rank :: self.team.size]:
            for start in range(span.start, span.stop, size or self.tokens):
                stop = min(start + (size or self.tokens), span.stop)
                found.append(Chunk(slice(start, stop), slice(place, place + stop - start)))
                place += stop - start
        return found

    def together(self, number: int) -> list[slice]:
        """What a team has at work while this process is at its chunk ``number``; alone nothing."""
        members = self.team.size
        return self.spans[number * members : (number + 1) * members] if members > 1 else []

    def part(self, mine: Tensor, span: slice) -> Tensor:
        """A stretch of the sequence, from whichever processes have it.

        Args:
            mine: what this process has, shape (batch, its tokens, ...).

        Returns:
            The same on all processes, shape (batch, tokens of ``span``, ...).
        """
        if self.team.size == 1:
            return mine[:, span]
        held = mine.new_zeros(mine.shape[0], span.stop - span.start, *mine.shape[2:])
        for own, place in self.own():
            first, last = max(own.start, span.start), min(own.stop, span.stop)
            if first < last:
                at = place.start + first - own.start
                held[:, first - span.start : last - span.start] = mine[:, at : at + last - first]
        return torch.stack(self.team.gather(held)).sum(dim=0)  # zeros but for one process's
