"""One layer of the long gradient: forward over a whole sequence, and back."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longrope.layerwise.chunks import Chunks
from longrope.layerwise.forward import LongForward
from longrope.layerwise.split_attention import SplitAttention
from longrope.layerwise.stand_ins import Recording

# What a layer goes on from, by kind and number.
_States = dict[tuple[str, int], Tensor]


class LayerGradient:
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
        self.apart = SplitAttention(chunks, forward.chunk, forward.device, forward.empty)

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
                "known; use --algorithm evolution"
            )
        return result_BTD

    def _through_states(self, slope_BTD: Tensor) -> None:
        own = list(enumerate(self.chunks.own()))
        states: list[_States] = [{}]
        for number, (span, place) in own[:-1]:
            cache = OwnKeys(span.start, states[-1])
            self._run(number, self._input(place), cache)
            states.append(cache.after)
        slopes: _States = {}
        for number, (span, place) in reversed(own):
            hidden = self._input(place).requires_grad_()
            before = {key: state.requires_grad_() for key, state in states.pop().items()}
            cache = OwnKeys(span.start, before)
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
            run = functools.partial(self._run, number, hidden, OwnKeys(span.start))
            self.apart.after(place, run, slope_BTD[:, place].to(self.forward.device))
            assert hidden.grad is not None
            slope_BTD[:, place] = hidden.grad
        self.apart.backward()
        for number, (span, place) in own:
            hidden = self._input(place).requires_grad_()
            run = functools.partial(self._run, number, hidden, OwnKeys(span.start))
            self.apart.before(place, run)
            assert hidden.grad is not None
            slope_BTD[:, place] += hidden.grad.to(slope_BTD.device)

    def _input(self, place: slice) -> Tensor:
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
    """A layer on a chunk, as the model calls it but for its cache."""
    held, (given, named) = recording.cache, arguments
    given = [cache if value is held else value for value in given]
    named = {name: cache if value is held else value for name, value in named.items()}
    output = layer(hidden, *given, **named)
    return output if isinstance(output, Tensor) else output[0]


class OwnKeys:
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
