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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longrope.attention import autograd
from longrope.layerwise.chunks import Chunks
from longrope.layerwise.forward import LongForward
from longrope.layerwise.layer_backward import LayerGradient, OwnKeys, run_layer
from longrope.layerwise.losses import loss_and_grad
from longrope.layerwise.stand_ins import LayerCache, Recording
from longrope.rope.apply import RescaledRotary, rescaled
from longrope.rope.rescale import Rescale
from longrope.rope.rotary import find_rotary

# Graphs of up to so many bytes, roughly, are kept rather than computed twice.
_KEPT = 4e9
# Products of attention: two forward; five backward, of which one is a forward's again.
BACKWARD_ATTENTION = 2.5
# Tokens that a slope is tried with.
_TRIED = 24
# Of the last hidden states: the loss, and its slope by them.
_LossOf = Callable[[Tensor], tuple[float, Tensor]]


class Slope(NamedTuple):
    """A loss in nats per token, and its derivative by ln λ, shape (d/2,), float64."""

    loss: float
    by_factor: Tensor


def gradient(forward: LongForward, input_ids: Tensor, answer_tokens: int = 0) -> Slope:
    """The mean loss of one sequence under the installed rescale, and its slope.

    Args:
        forward: of a model in which a rescale is :func:`rescaled`, ``always``.
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
        with torch.enable_grad():  # so that what is made of the cosines shows
            hidden_BTD, recordings = forward.embed(inputs_BT, chunks.own(), cache)
        _require_leaves(recordings)
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
        with torch.no_grad(), _frozen(forward.model), forward.attention(autograd.NAME):
            return forward.within_memory(compute)
    finally:
        rotary.tape = None


def check_gradient_support(forward: LongForward, rescale: Rescale, tokens: int) -> None:
    """See on a few tokens that sequences of so many have a slope, before any of that length.

    Raises:
        ValueError: the model's attention has something that no gradient is known of.
    """
    hidden_size = forward.decoder.config.hidden_size
    chunks = len(forward.chunks(tokens).spans)
    kept = is_kept(len(forward.layers), hidden_size, tokens, chunks) and not forward.offloaded
    short = LongForward(forward.model, _TRIED if kept else _TRIED // 2, offloaded=not kept)
    ids = torch.arange(1, _TRIED + 1)[None] % forward.model.config.get_text_config().vocab_size
    with rescaled(forward.model, rescale, always=True):
        gradient(short, ids)


def _require_leaves(recordings: Sequence[Recording]) -> None:
    """See that layers get the cosines as they were handed out, whose slopes are asked for."""
    for recording in recordings:
        for given, named in recording.arguments:
            for value in (*given, *named.values()):
                parts = value if isinstance(value, tuple | list) else [value]
                if any(isinstance(part, Tensor) and part.grad_fn is not None for part in parts):
                    raise ValueError(
                        "this model makes something of its cosines before a layer gets them, and "
                        "no slope is known of that; use --algorithm evolution"
                    )


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
            hidden_BTD = run_layer(layer, hidden_BTD, arguments, recording, OwnKeys(0))
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
        layers.append(LayerGradient(forward, index, recordings, chunks, hidden_BTD))
        hidden_BTD = layers[-1].output()
    recordings[0].cache.forget()
    loss, slope_BTD = loss_of(hidden_BTD)
    del hidden_BTD
    while layers:
        layers.pop().backward(slope_BTD)
    return loss


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
        loss, slope = loss_and_grad(logits.detach(), targets_BT[:, span], 1 / counted)
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
