"""One layer's attention over a whole sequence, run apart from the rest of the layer."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longrope.attention.autograd import replaced_attention
from longrope.attention.backward import slopes
from longrope.attention.chunked import Options, attend, slices
from longrope.layerwise.chunks import Chunks

# Bytes that heads at work may take going back, for each token of a chunk: fewer, as that is halved,
# where memory runs out. One head takes what it takes.
_HEADS = 5e5


class SplitAttention:
    """One layer's attention over a whole sequence, taken out of the layer that calls it.

    Forward (:meth:`attend`) it keeps outputs and log-sum-exps. Backward the layer runs on each
    chunk from its attention's output to its own (:meth:`after`), then attention itself is gone
    back through, the whole sequence at once (:meth:`backward`), then the layer on each chunk from
    its input to its attention (:meth:`before`). Of a team each process has its chunks, but for
    the second of these, when it has some heads of all tokens.

    Args:
        chunks: of the sequence.
        size: of one, at most.
        device: where to compute.
        empty: makes what waits between chunks, of a shape and a dtype.
    """

    calls: int  # of attention by the layer, at most one
    options: Options
    output: Tensor
    lse: Tensor
    inputs: list[Tensor]
    slope: Tensor

    def __init__(
        self, chunks: Chunks, size: int, device: torch.device, empty: Callable[..., Tensor]
    ):
        self.chunks, self.size, self.device, self.empty = chunks, size, device, empty

    def attend(self, place: slice, run: Callable[[], Tensor]) -> Tensor:
        """What ``run`` gives, the layer on a chunk without gradients.

        Raises:
            ValueError: the layer calls its attention more than once.
        """
        self.calls = 0

        def attention(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
            self.calls += 1
            output, lse = attend(query, key, value, options)
            if self.calls > 1:
                return output
            if place.start == 0:
                self.options = options
                self.output, self.lse = self._whole(output), self._whole(lse)
            self.output[:, :, place], self.lse[:, :, place] = output, lse
            return output

        with replaced_attention(attention):
            result = run()
        if self.calls > 1:
            raise ValueError(
                f"a layer of this model calls its attention {self.calls} times, and no slope is "
                "known of that; use --algorithm evolution"
            )
        return result

    def after(self, place: slice, run: Callable[[], Tensor], slope: Tensor) -> None:
        """From the slope of a chunk's output, by what ``run`` gives, to that of its attention's."""
        leaf = self.output[:, :, place].to(self.device).detach().requires_grad_()

        def attention(*given: Any) -> Tensor:
            *inputs, _ = given
            if place.start == 0:
                self.inputs = [self._whole(tensor) for tensor in inputs]
                self.slope = self._whole(leaf)
            for whole, own in zip(self.inputs, inputs, strict=True):
                whole[:, :, place] = own.detach()
            return leaf

        with torch.enable_grad(), replaced_attention(attention):
            output = run()
        output.backward(slope)
        assert leaf.grad is not None
        self.slope[:, :, place] = leaf.grad

    def backward(self) -> None:
        """To the slopes of queries, keys and values, which are put in the place of these."""
        query, key, _ = self.inputs
        heads, groups, team = query.shape[1], query.shape[1] // key.shape[1], self.chunks.team.size
        shape = query.shape[3], self.chunks.tokens, self.size, query.dtype.itemsize
        most = heads_at_once(heads, *shape)
        # As few rounds as there may be, and in each as much for every process.
        rounds = -(-key.shape[1] // (max(1, most // groups) * team))
        step = -(-key.shape[1] // (rounds * team))
        for first in range(0, key.shape[1], step * team):
            last = min(first + step * team, key.shape[1])
            shares = slices(first, last, step)
            shares += [slice(last, last)] * (team - len(shares))
            self._backward(shares, groups, most)
        del self.output, self.lse, self.slope

    def _backward(self, shares: list[slice], groups: int, most: int) -> None:
        """Of some heads of keys for each process, with those of queries part by part."""

        def mine(tensor: Tensor, heads: list[slice]) -> Tensor:
            return self.chunks.to_heads([tensor[:, some].to(self.device) for some in heads])

        def put(tensor: Tensor, heads: list[slice], whole: Tensor) -> None:
            back = self.chunks.to_tokens(whole, [some.stop - some.start for some in heads])
            for some, part in zip(heads, back, strict=True):
                tensor[:, some] = part

        def part(heads: list[slice]) -> list[Tensor]:
            kept = (mine(tensor, heads) for tensor in (self.output, self.lse))
            saved = (mine(query, heads), *both, *kept)
            slope = mine(self.slope, heads)
            if slope.shape[1]:
                by_query, *found = slopes(slope, saved, self.options)
            else:  # nothing to do but to hand out what the others ask for
                by_query, *found = (torch.zeros_like(tensor) for tensor in saved[:3])
            put(query, heads, by_query)
            return found

        query, key, value = self.inputs
        both = mine(key, shares), mine(value, shares)
        each = [slices(share.start * groups, share.stop * groups, most) for share in shares]
        first, *others = itertools.zip_longest(*each, fillvalue=slice(0, 0))
        sums = part(list(first))
        if others:
            exact = torch.promote_types(query.dtype, torch.float32)
            sums = [tensor.to(exact) for tensor in sums]
        for heads in others:
            for total, more in zip(sums, part(list(heads)), strict=True):
                total += more
        for tensor, total in zip((key, value), sums, strict=True):
            put(tensor, shares, total.to(tensor.dtype))

    def before(self, place: slice, run: Callable[[], Tensor]) -> None:
        """From the slopes of a chunk's queries, keys and values back to where ``run`` begins."""

        def attention(*given: Any) -> Tensor:
            raise _Reached(given[:3])

        with torch.enable_grad(), replaced_attention(attention):
            try:
                run()
            except _Reached as reached:
                (inputs,) = reached.args
            else:
                raise AssertionError("a layer without attention")
        by_inputs = [whole[:, :, place].to(self.device) for whole in self.inputs]
        torch.autograd.backward(inputs, by_inputs)

    def _whole(self, part: Tensor) -> Tensor:
        """Room for all of this process's tokens, of which a part has shape (B, H, C, …)."""
        own = self.chunks.own()[-1].place.stop
        return self.empty((*part.shape[:2], own, *part.shape[3:]), part.dtype)


class _Reached(Exception):
    """A layer has come as far as its attention, with these inputs."""


def heads_at_once(heads: int, head_dim: int, tokens: int, chunk: int, size: int) -> int:
    """How many heads, of numbers of ``size`` bytes, are gone back through at a time."""
    return max(1, min(heads, int(_HEADS * chunk / _head_bytes(head_dim, tokens, size))))


def backward_bytes(
    heads: int, head_dim: int, tokens: int, chunk: int, size: int, here: bool
) -> float:
    """Bytes that this takes; fewer where what waits is ``here``, on the device that computes."""
    there = 5 * size * tokens * head_dim if here else 0
    one = _head_bytes(head_dim, tokens, size) - there
    return one * heads_at_once(heads, head_dim, tokens, chunk, size)


def _head_bytes(head_dim: int, tokens: int, size: int) -> float:
    """Query, key, value, output and their slopes; of the first three sums in float32."""
    return float(tokens * head_dim * (8 * size + 3 * 4))
