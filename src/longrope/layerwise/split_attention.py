"""Run a layer's attention over the whole sequence, split from the rest of the layer."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longrope.attention.autograd import replaced_attention
from longrope.attention.backward import attention_backward
from longrope.attention.chunked import Options, attention_with_lse, slices
from longrope.layerwise.chunks import Chunks

# Bytes that attention's backward pass may take per token of a chunk, if more than one head fits.
# Running out of memory halves the chunk size, and with it this budget.
_BYTES_PER_TOKEN = 5e5


class SplitAttention:
    """One layer's attention over a whole sequence, split from the rest of the layer.

    :meth:`forward` keeps attention outputs and log-sum-exps. The backward pass has three steps:
    :meth:`backward_after_attention` runs the layer on each chunk from its attention's output to its
    own output, :meth:`backward_attention` differentiates attention over the whole sequence, and
    :meth:`backward_before_attention` runs the layer on each chunk up to its attention. In a
    sequence-parallel group each process has its chunks, and in the second step some heads of all
    tokens.

    Args:
        chunks: of the sequence.
        size: chunk size in tokens.
        device: where to compute.
        empty: allocates storage of a shape and dtype for tensors of the whole sequence.
    """

    calls: int  # times the layer called its attention
    options: Options
    output: Tensor
    lse: Tensor
    inputs: list[Tensor]
    output_grad: Tensor

    def __init__(
        self, chunks: Chunks, size: int, device: torch.device, empty: Callable[..., Tensor]
    ):
        self.chunks, self.size, self.device, self.empty = chunks, size, device, empty

    def forward(self, place: slice, run: Callable[[], Tensor]) -> Tensor:
        """Run the layer on a chunk without gradients, and keep its attention's output.

        Args:
            place: of the chunk among this process's tokens.
            run: calls the layer.

        Returns:
            The layer's output.

        Raises:
            ValueError: the layer calls its attention more than once.
        """
        self.calls = 0

        def attention(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
            self.calls += 1
            output, lse = attention_with_lse(query, key, value, options)
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
                f"a layer of this model calls its attention {self.calls} times, so gradients are "
                "not supported: use algorithm 'evolution'"
            )
        return result

    def backward_after_attention(
        self, place: slice, run: Callable[[], Tensor], output_grad: Tensor
    ) -> None:
        """Run the layer backward on a chunk, from its output to its attention's output.

        Args:
            place: of the chunk among this process's tokens.
            run: calls the layer.
            output_grad: gradient of the layer's output on the chunk.
        """
        leaf = self.output[:, :, place].to(self.device).detach().requires_grad_()

        def attention(*given: Any) -> Tensor:
            *inputs, _ = given
            if place.start == 0:
                self.inputs = [self._whole(tensor) for tensor in inputs]
                self.output_grad = self._whole(leaf)
            for whole, own in zip(self.inputs, inputs, strict=True):
                whole[:, :, place] = own.detach()
            return leaf

        with torch.enable_grad(), replaced_attention(attention):
            output = run()
        output.backward(output_grad)
        assert leaf.grad is not None
        self.output_grad[:, :, place] = leaf.grad

    def backward_attention(self) -> None:
        """Differentiate the layer's attention over the whole sequence, some heads at a time.

        Replaces queries, keys and values by their gradients.
        """
        query, key, _ = self.inputs
        heads, groups = query.shape[1], query.shape[1] // key.shape[1]
        members = self.chunks.group.size
        shape = query.shape[3], self.chunks.tokens, self.size, query.dtype.itemsize
        most = heads_at_once(heads, *shape)
        # As few rounds as possible, each with equal shares of heads.
        rounds = -(-key.shape[1] // (max(1, most // groups) * members))
        step = -(-key.shape[1] // (rounds * members))
        for first in range(0, key.shape[1], step * members):
            last = min(first + step * members, key.shape[1])
            shares = slices(first, last, step)
            shares += [slice(last, last)] * (members - len(shares))
            self._backward(shares, groups, most)
        del self.output, self.lse, self.output_grad

    def _backward(self, shares: list[slice], groups: int, most: int) -> None:
        """Differentiate the attention of some key heads per process, their query heads in parts."""

        def mine(tensor: Tensor, heads: list[slice]) -> Tensor:
            return self.chunks.to_heads([tensor[:, some].to(self.device) for some in heads])

        def put(tensor: Tensor, heads: list[slice], whole: Tensor) -> None:
            back = self.chunks.to_tokens(whole, [some.stop - some.start for some in heads])
            for some, part in zip(heads, back, strict=True):
                tensor[:, some] = part

        def part(heads: list[slice]) -> list[Tensor]:
            kept = (mine(tensor, heads) for tensor in (self.output, self.lse))
            saved = (mine(query, heads), *both, *kept)
            output_grad = mine(self.output_grad, heads)
            if output_grad.shape[1]:
                query_grad, *found = attention_backward(output_grad, saved, self.options)
            else:  # no heads left for this process, which still takes part in the exchanges
                query_grad, *found = (torch.zeros_like(tensor) for tensor in saved[:3])
            put(query, heads, query_grad)
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

    def backward_before_attention(self, place: slice, run: Callable[[], Tensor]) -> None:
        """Run the layer backward on a chunk, from its queries, keys and values to its input."""

        def attention(*given: Any) -> Tensor:
            raise _AttentionReached(given[:3])

        with torch.enable_grad(), replaced_attention(attention):
            try:
                run()
            except _AttentionReached as reached:
                (inputs,) = reached.args
            else:
                raise AssertionError("the layer did not call its attention")
        input_grads = [whole[:, :, place].to(self.device) for whole in self.inputs]
        torch.autograd.backward(inputs, input_grads)

    def _whole(self, part: Tensor) -> Tensor:
        """Allocate an attention tensor for all of this process's tokens, like one chunk's.

        Shape (B, H, own tokens, …).
        """
        own = self.chunks.own()[-1].place.stop
        return self.empty((*part.shape[:2], own, *part.shape[3:]), part.dtype)


class _AttentionReached(Exception):
    """Exception that stops a layer at its attention, and holds the attention's inputs.

    A layer cannot be asked to stop midway, and running it to its end would double the cost.
    """


def heads_at_once(heads: int, head_dim: int, tokens: int, chunk: int, size: int) -> int:
    """Return how many heads split attention differentiates at a time.

    ``size`` is the bytes of a number.
    """
    return max(1, min(heads, int(_BYTES_PER_TOKEN * chunk / _head_bytes(head_dim, tokens, size))))


def backward_bytes(
    heads: int, head_dim: int, tokens: int, chunk: int, size: int, here: bool
) -> float:
    """Estimate the device memory of split attention's backward pass, in bytes.

    ``here``: the sequence's tensors are stored on the computing device; they are not counted.
    """
    there = 5 * size * tokens * head_dim if here else 0
    one = _head_bytes(head_dim, tokens, size) - there
    return one * heads_at_once(heads, head_dim, tokens, chunk, size)


def _head_bytes(head_dim: int, tokens: int, size: int) -> float:
    """Return the bytes that one head takes in split attention's backward pass.

    Query, key, value, output, their gradients, and three float32 sums.
    """
    return float(tokens * head_dim * (8 * size + 3 * 4))
