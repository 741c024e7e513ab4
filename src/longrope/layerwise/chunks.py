"""Split a sequence into chunks, and distribute them over a sequence-parallel group."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from longrope.distributed import SequenceParallelGroup


class Chunk(NamedTuple):
    """A chunk's span in the sequence, and its place among the tokens of this process."""

    span: slice
    place: slice


class Chunks:
    """The chunks of a sequence of ``tokens`` tokens, at most ``size`` tokens each.

    A sequence-parallel group works in rounds, one chunk per process. All processes have equally
    many chunks, and chunk lengths differ by at most one token, so the work is balanced. A sequence
    with fewer tokens than processes is not shared: every process computes all of it.
    """

    def __init__(self, tokens: int, size: int, group: SequenceParallelGroup):
        self.tokens = tokens
        self.group = group if tokens >= group.size else SequenceParallelGroup()
        members = self.group.size
        if members == 1:
            starts = [*range(0, tokens, size), tokens]
        else:
            count = min(-(-tokens // (size * members)), tokens // members) * members
            starts = [tokens * i // count for i in range(count + 1)]
        self.spans = [slice(a, b) for a, b in itertools.pairwise(starts)]

    def own(self, size: int | None = None) -> list[Chunk]:
        """Return this process's chunks in order, split further to at most ``size`` tokens."""
        return self._chunks_of(self.group.rank, size)

    def _chunks_of(self, rank: int, size: int | None = None) -> list[Chunk]:
        """Return the chunks of a rank, split further to at most ``size`` tokens."""
        found, place = [], 0
        for span in self.spans[rank :: self.group.size]:
            for start in range(span.start, span.stop, size or self.tokens):
                stop = min(start + (size or self.tokens), span.stop)
                found.append(Chunk(slice(start, stop), slice(place, place + stop - start)))
                place += stop - start
        return found

    def concurrent(self, number: int) -> list[slice]:
        """Return the spans of the chunks that the group processes at the same time.

        ``number`` is the round. Empty without a group.
        """
        members = self.group.size
        return self.spans[number * members : (number + 1) * members] if members > 1 else []

    def gather(self, mine: Tensor, span: slice) -> Tensor:
        """Gather a span of the sequence from the chunks of all processes.

        Args:
            mine: this process's tokens, shape (batch, own tokens, ...).
            span: of the sequence.

        Returns:
            Shape (batch, tokens of ``span``, ...), the same on every process.
        """
        if self.group.size == 1:
            return mine[:, span]
        held = mine.new_zeros(mine.shape[0], span.stop - span.start, *mine.shape[2:])
        for own, place in self.own():
            first, last = max(own.start, span.start), min(own.stop, span.stop)
            if first < last:
                at = place.start + first - own.start
                held[:, first - span.start : last - span.start] = mine[:, at : at + last - first]
        return self.group.sum(held)  # each token is non-zero on one process only

    def to_heads(self, own: Sequence[Tensor]) -> Tensor:
        """Exchange all heads of this process's chunks for its own heads of the whole sequence.

        Args:
            own: for each process the heads it is to get, the same list on every process; shapes
                (batch, heads, own tokens, ...).

        Returns:
            This process's heads, shape (batch, heads, tokens, ...).
        """
        if self.group.size == 1:
            return own[0]
        heads, mine = max(tensor.shape[1] for tensor in own), own[self.group.rank]
        sent = self._buffers(mine, heads)
        for buffer, tensor in zip(sent, own, strict=True):
            buffer[:, : tensor.shape[1], : tensor.shape[2]] = tensor
        found = self.group.exchange(sent)
        whole = mine.new_empty((*mine.shape[:2], self.tokens, *mine.shape[3:]))
        for rank, part in enumerate(found):
            for span, place in self._chunks_of(rank):
                whole[:, :, span] = part[:, : mine.shape[1], place]
        return whole

    def to_tokens(self, whole: Tensor, heads: Sequence[int]) -> list[Tensor]:
        """Exchange some heads of the whole sequence for all heads of this process's chunks.

        The inverse of :meth:`to_heads`.

        Args:
            whole: this process's heads, shape (batch, heads, tokens, ...).
            heads: number of heads of each process.

        Returns:
            For each process its heads of this process's tokens, (batch, heads, own tokens, ...).
        """
        if self.group.size == 1:
            return [whole]
        sent = self._buffers(whole, max(heads))
        for rank, buffer in enumerate(sent):
            for span, place in self._chunks_of(rank):
                buffer[:, : whole.shape[1], place] = whole[:, :, span]
        found, own = self.group.exchange(sent), self.own()[-1].place.stop
        return [part[:, :count, :own] for part, count in zip(found, heads, strict=True)]

    def _buffers(self, like: Tensor, heads: int) -> Tensor:
        """Allocate one send buffer per process, each with room for the chunks of any process."""
        longest = max(self._chunks_of(rank)[-1].place.stop for rank in range(self.group.size))
        return like.new_zeros((self.group.size, like.shape[0], heads, longest, *like.shape[3:]))
