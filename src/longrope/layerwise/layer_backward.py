"""Forward and backward pass of one layer over a whole sequence."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longrope.layerwise.chunks import Chunks
from longrope.layerwise.forward import LongForward
from longrope.layerwise.split_attention import SplitAttention
from longrope.layerwise.stand_ins import Recording

# Recurrent states of a layer, by kind and index.
_States = dict[tuple[str, int], Tensor]


class LayerGradient:
    """Forward and then backward pass of one layer over a whole sequence.

    A layer without attention runs backward chunk by chunk, from last to first, and passes the
    gradient of its recurrent state to the chunk before.
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
        self.split = SplitAttention(chunks, forward.chunk_size, forward.device, forward.empty)

    def output(self) -> Tensor:
        """Run the layer forward over the sequence, and keep what its backward pass needs.

        Returns:
            The output, in the shape of the input.

        Raises:
            ValueError: the layer's attention does not support gradients.
        """
        result_BTD = self.forward.empty(self.hidden_BTD.shape, self.hidden_BTD.dtype)
        cache = self.recordings[0].cache
        cache.begin_layer()
        for number, (span, place) in enumerate(self.chunks.own()):
            cache.begin_chunk(span.start, self.chunks.concurrent(number))
            run = functools.partial(self._run, number, self._input(place), cache)
            result_BTD[:, place] = self.split.forward(place, run)
        if cache.has_keys != bool(self.split.calls) or (cache.has_keys and cache.stateful):
            raise ValueError(
                "a layer of this model does not use transformers' attention interface, so "
                "gradients are not supported: use algorithm 'evolution'"
            )
        return result_BTD

    def _through_states(self, grad_BTD: Tensor) -> None:
        """Run the backward pass of a layer with recurrent states, from last chunk to first."""
        own = list(enumerate(self.chunks.own()))
        states: list[_States] = [{}]
        for number, (span, place) in own[:-1]:
            cache = ChunkCache(span.start, states[-1])
            self._run(number, self._input(place), cache)
            states.append(cache.after)
        grads: _States = {}
        for number, (span, place) in reversed(own):
            hidden = self._input(place).requires_grad_()
            before = {key: state.requires_grad_() for key, state in states.pop().items()}
            cache = ChunkCache(span.start, before)
            with torch.enable_grad():
                output = self._run(number, hidden, cache)
            after = [cache.after[key] for key in grads]
            grad = grad_BTD[:, place].to(self.forward.device)
            torch.autograd.backward([output, *after], [grad, *grads.values()])
            assert hidden.grad is not None
            grad_BTD[:, place] = hidden.grad
            grads = {key: state.grad for key, state in before.items() if state.grad is not None}

    def backward(self, grad_BTD: Tensor) -> None:
        """Run the layer backward: replace the gradient of its output by that of its input.

        Works in place. Gradients of the rotary embeddings accumulate in their own tensors.
        """
        if not self.split.calls:
            self._through_states(grad_BTD)
            return
        own = list(enumerate(self.chunks.own()))
        for number, (span, place) in own:
            hidden = self._input(place).requires_grad_()
            run = functools.partial(self._run, number, hidden, ChunkCache(span.start))
            self.split.backward_after_attention(
                place, run, grad_BTD[:, place].to(self.forward.device)
            )
            assert hidden.grad is not None
            grad_BTD[:, place] = hidden.grad
        self.split.backward_attention()
        for number, (span, place) in own:
            hidden = self._input(place).requires_grad_()
            run = functools.partial(self._run, number, hidden, ChunkCache(span.start))
            self.split.backward_before_attention(place, run)
            assert hidden.grad is not None
            grad_BTD[:, place] += hidden.grad.to(grad_BTD.device)

    def _input(self, place: slice) -> Tensor:
        """Return a chunk of the layer's input on the device, as a leaf of its backward pass."""
        return self.hidden_BTD[:, place].to(self.forward.device).detach()

    def _run(self, number: int, hidden: Tensor, cache: Any) -> Tensor:
        return run_layer(self.layer, hidden, self.arguments[number], self.recordings[number], cache)


def run_layer(
    layer: Any,
    hidden: Tensor,
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    recording: Recording,
    cache: Any,
) -> Tensor:
    """Run a layer on a chunk for its gradient, with its recorded arguments but another cache."""
    held, (given, named) = recording.cache, arguments
    given = [cache if value is held else value for value in given]
    named = {name: cache if value is held else value for name, value in named.items()}
    output = layer(hidden, *given, **named)
    return output if isinstance(output, Tensor) else output[0]


class ChunkCache:
    """Cache for one chunk of a layer's backward pass: recurrent states, but no past keys.

    Args:
        start: position of the chunk's first token.
        before: recurrent states after the previous chunk. ``after`` gets those after this one.
    """

    def __init__(self, start: int, before: _States | None = None):
        self.start, self.before = start, before or {}
        self.after: _States = {}

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the chunk's own keys and values, which the backward pass does not store here."""
        return key, value

    def get_seq_length(self, *_: Any) -> int:
        return self.start

    def is_recording_past(self, *_: Any) -> bool:
        return True  # else a single token would modify the state in place

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
        """Append the chunk's columns to the layer's convolution state, and keep the last ones."""
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
