"""The chunks of a sequence, in order; and where several processes share it, which are whose."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from longrope.distributed import Team


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

    def to_heads(self, own: Sequence[Tensor]) -> Tensor:
        """From all heads of a process's own tokens to its own heads of all tokens.

        Args:
            own: the heads that each process is to have, as many for one on all of them; shapes
                (batch, heads, this process's tokens, ...).

        Returns:
            This process's heads, shape (batch, heads, tokens, ...).
        """
        if self.team.size == 1:
            return own[0]
        heads, mine = max(tensor.shape[1] for tensor in own), own[self.team.rank]
        sent = self._room(mine, heads)
        for allocate, tensor in zip(sent, own, strict=True):
            allocate[:, : tensor.shape[1], : tensor.shape[2]] = tensor
        found = self.team.exchange(sent)
        whole = mine.new_empty((*mine.shape[:2], self.tokens, *mine.shape[3:]))
        for rank, part in enumerate(found):
            for span, place in self._of(rank):
                whole[:, :, span] = part[:, : mine.shape[1], place]
        return whole

    def to_tokens(self, whole: Tensor, heads: Sequence[int]) -> list[Tensor]:
        """The way back: what each process has, so many heads of all tokens, of this one's own.

        Returns:
            For each process a tensor of shape (batch, heads, this process's tokens, ...).
        """
        if self.team.size == 1:
            return [whole]
        sent = self._room(whole, max(heads))
        for rank, allocate in enumerate(sent):
            for span, place in self._of(rank):
                allocate[:, : whole.shape[1], place] = whole[:, :, span]
        found, own = self.team.exchange(sent), self.own()[-1].place.stop
        return [part[:, :count, :own] for part, count in zip(found, heads, strict=True)]

    def _room(self, like: Tensor, heads: int) -> Tensor:
        """For every process so many heads of as many tokens as any of them has."""
        longest = max(self._of(rank)[-1].place.stop for rank in range(self.team.size))
        return like.new_zeros((self.team.size, like.shape[0], heads, longest, *like.shape[3:]))
