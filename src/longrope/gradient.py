"""The long gradient: how the loss of a sequence of any length changes with each factor.

The backward pass of the long forward, layer-major too. Going forward it keeps of every layer its
input and its attention's output, where the hidden states live. Going back it takes the layers
from the last to the first: each runs again with gradients, chunk by chunk, what follows its
attention and what comes before; between the two its attention is gone back through by itself, some
heads at a time, so that a device needs about what it does for a forward. The graph of a sequence
of one chunk is kept if it is small, and nothing runs twice. A team of processes shares all of it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longrope import attention_gradient
from longrope.chunks import Chunks
from longrope.facts import ModelFacts
from longrope.forward import LongForward
from longrope.layers import LayerCache, Recording
from longrope.likelihood import loss_and_slope
from longrope.rope.install import RescaledRotary
from longrope.rope.site import find_rotary

# Graphs of up to so many bytes, roughly, are kept rather than computed twice.
_KEPT = 4e9
# Products of attention: two forward; five backward, of which one is a forward's again.
_BACKWARD_ATTENTION = 2.5
# What a layer goes on from, by kind and number.
_States = dict[tuple[str, int], Tensor]
# Of the last hidden states: the loss, and its slope by them.
_LossOf = Callable[[Tensor], tuple[float, Tensor]]


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
    ids_BT = input_ids.to(forward.device)
    inputs_BT, targets_BT = ids_BT[:, :-1], ids_BT[:, 1:]
    counted = answer_tokens or targets_BT.shape[1]

    def compute() -> Slope:
        chunks = forward.chunks(inputs_BT.shape[1])
        rotary.tape = []
        cache = LayerCache(inputs_BT.shape[1], chunks.team, forward.decoder.config)
        hidden_BTD, recordings = forward.embed(inputs_BT, chunks.own(), cache)
        handed_out, rotary.tape = rotary.tape, None  # the head rotates nothing
        loss_of = functools.partial(_head, forward, chunks, inputs_BT, targets_BT, counted)
        shape = len(forward.layers), hidden_BTD.shape[2], hidden_BTD.shape[1]
        if not forward.offloaded and is_kept(*shape, len(chunks.spans)):
            loss = _in_one(forward, hidden_BTD, recordings[0], loss_of)
        else:
            loss = _by_layers(forward, hidden_BTD, recordings, chunks, loss_of)
        by_factor = rotary.gradient(handed_out)
        found = chunks.team.sum(torch.cat([by_factor, by_factor.new_tensor([loss])]))
        return Slope(found[-1].item(), found[:-1])

    try:
        with torch.no_grad(), _frozen(forward.model), forward.attention(attention_gradient.NAME):
            return forward.within_memory(compute)
    finally:
        rotary.tape = None


def forwards(facts: ModelFacts, length: int, chunk: int) -> float:
    """What one gradient costs, in forwards of the same sequence, by FLOPs.

    The weights are frozen: a product with weights is done once forward and once backward. The same
    for offloaded weights and for a team, which keep no graph, so that histories are the same too.
    """
    linear, attention = facts.forward_flops(length)
    again = 0.0
    if not is_kept(facts.layers, facts.hidden_size, length, -(-length // chunk)):
        # The layers once more; once more again what makes queries, keys and values, or states.
        inputs = facts.hidden_size * (facts.heads + 2 * facts.kv_heads) * facts.head_dim
        again = 1 + 2 * facts.attention_layers * inputs * length / linear
        again += 1 - facts.attention_layers / facts.layers
    work = (2 + again) * linear + (1 + _BACKWARD_ATTENTION) * attention
    return work / (linear + attention)


def graph_bytes(layers: int, hidden_size: int, tokens: int) -> float:
    """Bytes of the graph of so many layers, about 24 float32 hidden states each."""
    return layers * hidden_size * tokens * 24 * 4.0


def is_kept(layers: int, hidden_size: int, tokens: int, chunks: int) -> bool:
    """Whether the graph of all layers is kept: one chunk (each has its past's copy), and small."""
    return chunks == 1 and graph_bytes(layers, hidden_size, tokens) <= _KEPT


def _in_one(
    forward: LongForward, hidden_BTD: Tensor, recording: Recording, loss_of: _LossOf
) -> float:
    """The loss, and back through a graph of all layers: one chunk, nothing runs twice."""
    with torch.enable_grad():
        hidden_BTD = hidden_BTD.to(forward.device)
        for layer, arguments in zip(forward.layers, recording.arguments, strict=True):
            hidden_BTD = _run(layer, hidden_BTD, arguments, recording, _OwnKeys(0))
    loss, slope_BTD = loss_of(hidden_BTD.detach())
    if hidden_BTD.requires_grad:  # or no cosine reaches it, which is said later
        hidden_BTD.backward(slope_BTD.to(forward.device))
    return loss


def _by_layers(
    forward: LongForward,
    hidden_BTD: Tensor,
    recordings: list[Recording],
    chunks: Chunks,
    loss_of: _LossOf,
) -> float:
    """The loss, and back: a layer at a time, and of that a chunk or some heads of its attention."""
    layers = []
    for index in range(len(forward.layers)):
        layers.append(_Layer(forward, index, recordings, chunks, hidden_BTD))
        hidden_BTD = layers[-1].output()
    recordings[0].cache.forget()
    loss, slope_BTD = loss_of(hidden_BTD)
    del hidden_BTD
    while layers:
        layers.pop().backward(slope_BTD)
    return loss


class _Layer:
    """One layer over a whole sequence, forward and then backward.

    One without attention goes back chunk by chunk, from the last to the first, with the slope of
    the state that each hands to the next.
    """

    def __init__(
        self,
        forward: LongForward,
        index: int,
        recordings: list[Recording],
        chunks: Chunks,
        hidden_BTD: Tensor,
    ):
        self.forward, self.layer = forward, forward.layers[index]
        self.recordings, self.chunks, self.hidden_BTD = recordings, chunks, hidden_BTD
        self.arguments = [recording.arguments[index] for recording in recordings]
        self.apart = attention_gradient.Apart(chunks, forward.chunk, forward.device, forward.empty)

    def output(self) -> Tensor:
        """The layer's output, shape as its input."""
        result_BTD = self.forward.empty(self.hidden_BTD.shape, self.hidden_BTD.dtype)
        cache = self.recordings[0].cache
        cache.begin()
        for number, (span, place) in enumerate(self.chunks.own()):
            cache.start, cache.together = span.start, self.chunks.together(number)
            run = functools.partial(self._run, number, self._input(place), cache)
            result_BTD[:, place] = self.apart.attend(place, run)
        if cache.has_keys != bool(self.apart.calls) or (cache.has_keys and cache.stateful):
            raise ValueError(
                "a layer of this model has an attention of its own kind, of which no slope is "
                "known; use --algorithm paper"
            )
        return result_BTD

    def _through_states(self, slope_BTD: Tensor) -> None:
        own = list(enumerate(self.chunks.own()))
        states: list[_States] = [{}]
        for number, (span, place) in own[:-1]:
            cache = _OwnKeys(span.start, states[-1])
            self._run(number, self._input(place), cache)
            states.append(cache.after)
        slopes: _States = {}
        for number, (span, place) in reversed(own):
            hidden = self._input(place).requires_grad_()
            before = {key: state.requires_grad_() for key, state in states.pop().items()}
            cache = _OwnKeys(span.start, before)
            with torch.enable_grad():
                output = self._run(number, hidden, cache)
            after = [cache.after[key] for key in slopes]
            slope = slope_BTD[:, place].to(self.forward.device)
            torch.autograd.backward([output, *after], [slope, *slopes.values()])
            assert hidden.grad is not None
            slope_BTD[:, place] = hidden.grad
            slopes = {key: state.grad for key, state in before.items() if state.grad is not None}

    def backward(self, slope_BTD: Tensor) -> None:
        """From d loss / d output to d loss / d input, in its place; the cosines gather theirs."""
        if not self.apart.calls:
            self._through_states(slope_BTD)
            return
        own = list(enumerate(self.chunks.own()))
        for number, (span, place) in own:
            hidden = self._input(place).requires_grad_()
            run = functools.partial(self._run, number, hidden, _OwnKeys(span.start))
            self.apart.after(place, run, slope_BTD[:, place].to(self.forward.device))
            assert hidden.grad is not None
            slope_BTD[:, place] = hidden.grad
        self.apart.backward()
        for number, (span, place) in own:
            hidden = self._input(place).requires_grad_()
            run = functools.partial(self._run, number, hidden, _OwnKeys(span.start))
            self.apart.before(place, run)
            assert hidden.grad is not None
            slope_BTD[:, place] += hidden.grad.to(slope_BTD.device)

    def _input(self, place: slice) -> Tensor:
        return self.hidden_BTD[:, place].to(self.forward.device).detach()

    def _run(self, number: int, hidden: Tensor, cache: Any) -> Tensor:
        return _run(self.layer, hidden, self.arguments[number], self.recordings[number], cache)


def _run(
    layer: Any,
    hidden: Tensor,
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    recording: Recording,
    cache: Any,
) -> Tensor:
    """A layer on a chunk, as the model calls it but for its cache."""
    held, (given, named) = recording.cache, arguments
    given = [cache if value is held else value for value in given]
    named = {name: cache if value is held else value for name, value in named.items()}
    output = layer(hidden, *given, **named)
    return output if isinstance(output, Tensor) else output[0]


class _OwnKeys:
    """What a layer takes for its cache where its attention looks at no other chunk.

    Args:
        start: of the chunk.
        before: of a layer that goes on from a state, that after the chunk before; ``after`` is
            the state after this one.
    """

    def __init__(self, start: int, before: _States | None = None):
        self.start, self.before = start, before or {}
        self.after: _States = {}

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key, value

    def get_seq_length(self, *_: Any) -> int:
        return self.start

    def is_recording_past(self, *_: Any) -> bool:
        return True  # or a single token would change the state in its place

    def has_previous_state(self, *_: Any) -> bool:
        return bool(self.before)

    def get_conv_state(self, layer: int, state_idx: int = 0) -> Tensor | None:
        return self.before.get(("convolution", state_idx))

    def update_conv_state(
        self,
        states: Tensor,
        layer: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> Tensor:
        """The columns of the chunk behind those of the state, of which the last ones stay."""
        before = self.get_conv_state(layer, state_idx)
        size = conv_kernel_size or states.shape[-1]
        whole = states if before is None else torch.cat([before, states], dim=-1)
        last = whole[..., -size:]
        self.after["convolution", state_idx] = F.pad(last, (size - last.shape[-1], 0))
        return whole

    def get_recurrent_state(self, layer: int, state_idx: int = 0) -> Tensor | None:
        return self.before.get(("recurrent", state_idx))

    def update_recurrent_state(
        self, states: Tensor, layer: int, state_idx: int = 0, **_: Any
    ) -> Tensor:
        self.after["recurrent", state_idx] = states
        return states


def _head(
    forward: LongForward,
    chunks: Chunks,
    inputs_BT: Tensor,
    targets_BT: Tensor,
    counted: int,
    hidden_BTD: Tensor,
) -> tuple[float, Tensor]:
    """This process's share of the mean loss of the last ``counted`` tokens, and its slope by the
    last hidden states.
    """
    slope_BTD, total = forward.empty(hidden_BTD.shape, hidden_BTD.dtype), 0.0
    for span, place in chunks.own(forward.head_rows):
        first = max(span.start, targets_BT.shape[1] - counted)
        if first >= span.stop:
            slope_BTD[:, place] = 0
            continue
        slope_BTD[:, place.start : place.stop - (span.stop - first)] = 0
        span, place = slice(first, span.stop), slice(place.stop - (span.stop - first), place.stop)
        leaf = hidden_BTD[:, place].to(forward.device).detach().requires_grad_()
        with torch.enable_grad():
            logits = forward.logits(inputs_BT, leaf, span)
        loss, slope = loss_and_slope(logits.detach(), targets_BT[:, span], 1 / counted)
        logits.backward(slope)
        total += loss
        assert leaf.grad is not None
        slope_BTD[:, place] = leaf.grad
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
