"""The long gradient: how the loss of a sequence of any length changes with each factor.

The backward pass of the long forward, layer-major too. Going forward it keeps the input
of every layer (where the hidden states live); going back it takes the layers from the last
to the first and, in each, the chunks from the last to the first: a chunk runs again with
gradients, its keys and values having gathered by then what all later chunks asked of them.
Memory: per layer and token a hidden state and the output of attention (so that attention runs
forward once), one layer's keys and values and their gradients, one chunk's graph. Sequences
of one chunk keep it if it is small, and nothing runs twice.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longrope import attention_gradient
from longrope.facts import ModelFacts
from longrope.forward import LongForward
from longrope.layers import Recording
from longrope.likelihood import loss_and_slope
from longrope.rope.install import RescaledRotary
from longrope.rope.site import find_rotary

# Graphs of up to so many bytes, roughly, are kept rather than computed twice.
_KEPT = 4e9
# Products of attention: two forward; five backward, of which one is a forward's again.
_BACKWARD_ATTENTION = 2.5


class Slope(NamedTuple):
    """A loss in nats per token, and its derivative by ln λ, shape (d/2,), float64."""

    loss: float
    by_factor: Tensor


def gradient(forward: LongForward, input_ids: Tensor, answer_tokens: int = 0) -> Slope:
    """The mean loss of one sequence under the installed rescale, and its slope.

    Args:
        forward: of a model in which a rescale is :func:`installed`, ``always``.
        input_ids: shape (1, tokens).
        answer_tokens: only so many at the end count, where it is given.

    Raises:
        ValueError: the model's attention has something that no gradient is known of.
    """
    site = find_rotary(forward.model)
    assert site is not None
    rotary = getattr(site.owner, site.name)
    assert isinstance(rotary, RescaledRotary), "installed(…, always=True) is missing"
    assert forward.team.size == 1, "slopes are not shared by a team"
    ids_BT = input_ids.to(forward.device)
    inputs_BT, targets_BT = ids_BT[:, :-1], ids_BT[:, 1:]
    counted = answer_tokens or targets_BT.shape[1]

    def compute() -> Slope:
        chunks = forward.chunks(inputs_BT.shape[1]).own()
        spans = [chunk.span for chunk in chunks]
        rotary.tape = []
        hidden_BTD, recordings = forward.embed(inputs_BT, chunks)
        handed_out, rotary.tape = rotary.tape, None  # the head rotates nothing
        layers = []
        for index in range(len(forward.layers)):
            layers.append(_Layer(forward, index, spans, recordings, hidden_BTD))
            hidden_BTD = layers[-1].output()
        loss, slope_BTD = _head(forward, inputs_BT, targets_BT, hidden_BTD, counted)
        del hidden_BTD
        while layers:
            slope_BTD = layers.pop().backward(slope_BTD)
        return Slope(loss, rotary.gradient(handed_out))

    try:
        with torch.no_grad(), _frozen(forward.model), forward.attention(attention_gradient.NAME):
            return forward.within_memory(compute)
    finally:
        rotary.tape = None


def forwards(facts: ModelFacts, length: int, chunk: int) -> float:
    """What one gradient costs, in forwards of the same sequence, by FLOPs.

    The weights are frozen: a product with weights is done once forward and once backward. The same
    where weights are offloaded, whose graphs are never kept, so that histories are the same too.
    """
    linear, attention = facts.forward_flops(length)
    chunks = -(-length // chunk)
    again = 1 + (chunks > 1)
    if is_kept(facts.layers, facts.hidden_size, length, chunks):
        again = 0
    work = (2 + again) * linear + (1 + _BACKWARD_ATTENTION) * attention
    return work / (linear + attention)


def graph_bytes(layers: int, hidden_size: int, tokens: int) -> float:
    """Bytes of the graph of so many layers, about 24 float32 hidden states each."""
    return layers * hidden_size * tokens * 24 * 4.0


def is_kept(layers: int, hidden_size: int, tokens: int, chunks: int) -> bool:
    """Whether the graph of all layers is kept: one chunk (each has its past's copy), and small."""
    return chunks == 1 and graph_bytes(layers, hidden_size, tokens) <= _KEPT


class _Piece(NamedTuple):
    """The graph of one layer on one chunk."""

    hidden: Tensor
    past: "_ChunkCache"
    output: Tensor


class _Layer:
    """One layer over a whole sequence, forward and then backward."""

    def __init__(
        self,
        forward: LongForward,
        index: int,
        spans: list[slice],
        recordings: list[Recording],
        hidden_BTD: Tensor,
    ):
        self.layer, self.device = forward.layers[index], forward.device
        self.arguments = [recording.arguments[index] for recording in recordings]
        self.held = recordings[0].cache
        self.spans, self.hidden_BTD = spans, hidden_BTD
        config = forward.decoder.config
        self.keep = not forward.offloaded and is_kept(
            config.num_hidden_layers, hidden_BTD.shape[-1], spans[-1].stop, len(spans)
        )
        self.pieces: list[_Piece] = []
        self.memory = attention_gradient.Memory(forward.hidden_device)

    def output(self) -> Tensor:
        """The layer's output, shape as its input."""
        result = torch.empty_like(self.hidden_BTD)
        self.cache = _Cache(self.spans[-1].stop)
        for number, span in enumerate(self.spans):
            with torch.set_grad_enabled(self.keep):
                piece = self._run(number)
            result[:, span] = piece.output.detach()
            if self.keep:
                self.pieces.append(piece)
        if not self.keep:
            del self.cache
            if len(self.memory.calls) != len(self.spans):
                raise ValueError(
                    f"{type(self.layer).__name__} calls its attention "
                    f"{len(self.memory.calls) / len(self.spans):g} times; use --algorithm paper"
                )
        return result

    def backward(self, slope_BTD: Tensor) -> Tensor:
        """From d loss / d output to d loss / d input; the cosines gather theirs."""
        if not self.keep:
            self.cache = _Cache(self.spans[-1].stop)
            for number in range(len(self.spans) - 1):
                self._run(number)
        result = torch.empty_like(slope_BTD)
        for number in reversed(range(len(self.spans))):
            span = self.spans[number]
            with torch.enable_grad():
                piece = self.pieces.pop() if self.keep else self._run(number)
            of_output = slope_BTD[:, span].to(self.device)
            roots, slopes = [piece.output], [of_output]
            for own, slope in piece.past.own(self.cache):
                roots.append(own)
                slopes.append(slope)
            torch.autograd.backward(roots, slopes)
            piece.past.gather(self.cache)
            assert piece.hidden.grad is not None
            result[:, span] = piece.hidden.grad
        return result

    def _run(self, number: int) -> _Piece:
        """The layer on one chunk, on leaves of its own; keys and values go to the cache.

        A layer calls attention once, so a chunk's number is its call's.
        """
        hidden = self.hidden_BTD[:, self.spans[number]].to(self.device).detach()
        hidden.requires_grad_(torch.is_grad_enabled())
        past = _ChunkCache(self.cache, self.spans[number].start)
        arguments = {
            name: past if value is self.held else value
            for name, value in self.arguments[number].items()
        }
        if self.keep:
            output = self.layer(hidden, **arguments)
        else:
            with self.memory.at(number):
                output = self.layer(hidden, **arguments)
        return _Piece(hidden, past, output if isinstance(output, Tensor) else output[0])


class _Cache:
    """Keys and values of one layer for the whole sequence, and the loss's slopes by them."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.content: tuple[Tensor, Tensor] | None = None
        self.slopes: tuple[Tensor, Tensor] | None = None

    def write(self, start: int, both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if self.content is None:
            key, value = (t.new_empty((*t.shape[:2], self.tokens, t.shape[3])) for t in both)
            self.content = (key, value)
        for buffer, own in zip(self.content, both, strict=True):
            buffer[:, :, start : start + own.shape[2]] = own.detach()
        return self.content

    def slope(self) -> tuple[Tensor, Tensor]:
        if self.slopes is None:
            assert self.content is not None
            # Summed over chunks in float32: in bfloat16 what is added last would be lost.
            key, value = (
                torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32))
                for t in self.content
            )
            self.slopes = (key, value)
        return self.slopes


class _ChunkCache:
    """What a layer takes for its cache while one chunk runs: the past as leaves, and its own."""

    def __init__(self, cache: _Cache, start: int):
        self.cache = cache
        self.start = start
        self.leaves: list[Tensor] = []
        self.made: list[Tensor] = []

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        content = self.cache.write(self.start, (key, value))
        end = self.start + key.shape[2]
        if not torch.is_grad_enabled():
            return content[0][:, :, :end], content[1][:, :, :end]
        self.made = [key, value]
        self.leaves = [t[:, :, : self.start].detach().requires_grad_() for t in content]
        key, value = (torch.cat(both, dim=2) for both in zip(self.leaves, self.made, strict=True))
        return key, value

    def get_seq_length(self, *_: Any) -> int:
        return self.start

    def own(self, cache: _Cache) -> Iterator[tuple[Tensor, Tensor]]:
        """The chunk's own keys and values, each with what later chunks asked of it."""
        for made, slope in zip(self.made, cache.slope(), strict=True):
            yield made, slope[:, :, self.start : self.start + made.shape[2]].to(made.dtype)

    def gather(self, cache: _Cache) -> None:
        """Add what this chunk asks of the keys and values before it."""
        for leaf, slope in zip(self.leaves, cache.slope(), strict=True):
            if leaf.grad is not None:
                slope[:, :, : self.start] += leaf.grad


def _head(
    forward: LongForward, inputs_BT: Tensor, targets_BT: Tensor, hidden_BTD: Tensor, counted: int
) -> tuple[float, Tensor]:
    """The mean loss of the last ``counted`` tokens, and its slope by the last hidden states."""
    slope_BTD, total = torch.zeros_like(hidden_BTD), 0.0
    tokens = targets_BT.shape[1]
    for span, _ in forward.chunks(tokens).own(forward.head_rows):
        span = slice(max(span.start, tokens - counted), span.stop)
        if span.start >= span.stop:
            continue
        leaf = hidden_BTD[:, span].to(forward.device).detach().requires_grad_()
        with torch.enable_grad():
            logits = forward.logits(inputs_BT, leaf, span)
        loss, slope = loss_and_slope(logits.detach(), targets_BT[:, span], 1 / counted)
        logits.backward(slope)
        total += loss
        assert leaf.grad is not None
        slope_BTD[:, span] = leaf.grad
    return total / counted, slope_BTD


@contextlib.contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No gradients by the weights: only what the factors reach is computed."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()
