"""The chunks of a sequence, in order; and where several processes share it, which are whose."""

import itertools
from collections.abc import Sequence
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
        return self._of(self.team.rank, size)

    def _of(self, rank: int, size: int | None = None) -> list[Chunk]:
        found, place = [], 0
        for span in self.spans[rank :: self.team.size]:
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
        return self.team.sum(held)  # zeros but for one process's

    def whole(self, mine: Sequence[Tensor]) -> Tensor:
        """From tensors of a process's tokens, one for each process, to one of all tokens.

        Args:
            mine: for each process some heads, shape (batch, heads, this one's tokens, ...); the
                same numbers of heads on all.

        Returns:
            This process's heads, shape (batch, heads, tokens, ...).
        """
        if self.team.size == 1:
            return mine[0]
        heads, tokens = max(tensor.shape[1] for tensor in mine), self._longest
        found = self.team.exchange([_padded(tensor, heads, tokens) for tensor in mine])
        first = mine[self.team.rank]
        result = first.new_empty((*first.shape[:2], self.tokens, *first.shape[3:]))
        for rank, part in enumerate(found):
            for span, place in self._of(rank):
                result[:, :, span] = part[:, : first.shape[1], place]
        return result

    def parts(self, whole: Tensor, heads: Sequence[int]) -> list[Tensor]:
        """The way back: of every process's heads, so many, this one's tokens."""
        if self.team.size == 1:
            return [whole]
        sent = []
        for rank in range(self.team.size):
            theirs = torch.cat([whole[:, :, span] for span, _ in self._of(rank)], dim=2)
            sent.append(_padded(theirs, max(heads), self._longest))
        own = self.own()[-1].place.stop
        found = zip(self.team.exchange(sent), heads, strict=True)
        return [part[:, :count, :own] for part, count in found]

    @property
    def _longest(self) -> int:
        """The most tokens that a process has."""
        return max(self._of(rank)[-1].place.stop for rank in range(self.team.size))


def _padded(tensor: Tensor, heads: int, tokens: int) -> Tensor:
    room = tensor.new_zeros((tensor.shape[0], heads, tokens, *tensor.shape[3:]))
    room[:, : tensor.shape[1], : tensor.shape[2]] = tensor
    return room
