"""Layer-by-layer backward pass: the gradient of a loss with respect to the rescale factors.

The forward pass stores each layer's input and attention output with the offloaded hidden states.
The backward pass takes the layers from last to first and recomputes each one chunk by chunk.
Attention is differentiated separately, some heads at a time, so the device memory is about that
of a forward pass. For a sequence of one chunk with a small graph, the graph is kept and nothing
is recomputed. A sequence-parallel group shares all of the work.
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
from longrope.layerwise.layer_backward import ChunkCache, LayerGradient, run_layer
from longrope.layerwise.output_head import loss_and_grad
from longrope.layerwise.stand_ins import LayerCache, Recording
from longrope.rope.apply import RescaledRotary, rescaled
from longrope.rope.rescale import Rescale
from longrope.rope.rotary import find_rotary

# Largest graph in bytes that is kept rather than recomputed.
_MAX_GRAPH_BYTES = 4e9
# FLOPs of attention's backward pass over its forward pass: five matrix products against two.
BACKWARD_ATTENTION = 2.5
# Length of the sequence that check_gradient_support computes a gradient of.
_PROBE_TOKENS = 24
# From the last hidden states to the loss and its gradient with respect to them.
_LossOf = Callable[[Tensor], tuple[float, Tensor]]


class LossAndGrad(NamedTuple):
    """Result of a layer-by-layer backward pass: a sequence's loss and its gradient.

    ``loss`` is in nats per token; ``grad`` is with respect to ln λ, shape (d/2,), float64.
    """

    loss: float
    grad: Tensor


def gradient(forward: LongForward, input_ids: Tensor, answer_tokens: int = 0) -> LossAndGrad:
    """Compute a sequence's mean loss and its gradient with respect to ln λ, layer by layer.

    Args:
        forward: of a model inside ``rescaled(model, rescale, always=True)``.
        input_ids: shape (1, tokens).
        answer_tokens: if not 0, the loss is the mean over the last ``answer_tokens`` tokens.

    Raises:
        ValueError: the model's attention does not support gradients.
    """
    site = find_rotary(forward.model)
    assert site is not None
    rotary = getattr(site.owner, site.name)
    assert isinstance(rotary, RescaledRotary), "requires rescaled(…, always=True)"
    ids_BT = forward.on_device(input_ids)
    inputs_BT, targets_BT = ids_BT[:, :-1], ids_BT[:, 1:]
    counted = answer_tokens or targets_BT.shape[1]

    def compute() -> LossAndGrad:
        chunks = forward.chunks(inputs_BT.shape[1])
        cache = LayerCache(inputs_BT.shape[1], chunks.group, forward.decoder.config)
        # Layers get their rotations from the decoder, so the embedding step computes all of them.
        # Gradients are enabled so that _require_leaves sees what is computed from them.
        with rotary.recording() as recorded, torch.enable_grad():
            hidden_BTD, recordings = forward.embed(inputs_BT, chunks.own(), cache)
        _require_leaves(recordings)
        loss_of = functools.partial(_head, forward, chunks, inputs_BT, targets_BT, counted)
        shape = len(forward.layers), hidden_BTD.shape[2], hidden_BTD.shape[1]
        if not forward.offloaded and is_kept(*shape, len(chunks.spans)):
            loss = _in_one(forward, hidden_BTD, recordings[0], loss_of)
        else:
            loss = _by_layers(forward, hidden_BTD, recordings, chunks, loss_of)
        grad = rotary.gradient(recorded)
        found = chunks.group.sum(torch.cat([grad, grad.new_tensor([loss])]))
        return LossAndGrad(found[-1].item(), found[:-1])

    with torch.no_grad(), _frozen(forward.model), forward.attention(autograd.NAME):
        return forward.within_memory(compute)


def check_gradient_support(forward: LongForward, rescale: Rescale, tokens: int) -> None:
    """Check on a few tokens that a model supports the layer-by-layer backward pass.

    Args:
        forward: of the model to check.
        rescale: any rescale of the model.
        tokens: length of the sequences to come, which decides how gradients are computed.

    Raises:
        ValueError: the model's attention does not support gradients.
    """
    hidden_size = forward.decoder.config.hidden_size
    chunks = len(forward.chunks(tokens).spans)
    kept = is_kept(len(forward.layers), hidden_size, tokens, chunks) and not forward.offloaded
    short = LongForward(
        forward.model, _PROBE_TOKENS if kept else _PROBE_TOKENS // 2, offloaded=not kept
    )
    ids = (
        torch.arange(1, _PROBE_TOKENS + 1)[None] % forward.model.config.get_text_config().vocab_size
    )
    with rescaled(forward.model, rescale, always=True):
        gradient(short, ids)


def _require_leaves(recordings: Sequence[Recording]) -> None:
    """Refuse the backward pass of a model that transforms rotary cosines before its layers."""
    for recording in recordings:
        for given, named in recording.arguments:
            for value in (*given, *named.values()):
                parts = value if isinstance(value, tuple | list) else [value]
                if any(isinstance(part, Tensor) and part.grad_fn is not None for part in parts):
                    raise ValueError(
                        "this model transforms its rotary cosines before its layers get them, "
                        "so gradients are not supported: use algorithm 'evolution'"
                    )


def graph_bytes(layers: int, hidden_size: int, tokens: int) -> float:
    """Estimate the bytes of the backward pass's graph: 24 float32 hidden states per layer."""
    return layers * hidden_size * tokens * 24 * 4.0


def is_kept(layers: int, hidden_size: int, tokens: int, chunks: int) -> bool:
    """Whether the backward pass keeps the graph of all layers: one chunk, and small enough."""
    return chunks == 1 and graph_bytes(layers, hidden_size, tokens) <= _MAX_GRAPH_BYTES


def _in_one(
    forward: LongForward, hidden_BTD: Tensor, recording: Recording, loss_of: _LossOf
) -> float:
    """Compute the loss and run the backward pass through one graph of all layers."""
    with torch.enable_grad():
        hidden_BTD = hidden_BTD.to(forward.device)
        for layer, arguments in zip(forward.layers, recording.arguments, strict=True):
            hidden_BTD = run_layer(layer, hidden_BTD, arguments, recording, ChunkCache(0))
    loss, grad_BTD = loss_of(hidden_BTD.detach())
    if hidden_BTD.requires_grad:  # else rotary.gradient raises
        hidden_BTD.backward(grad_BTD.to(forward.device))
    return loss


def _by_layers(
    forward: LongForward,
    hidden_BTD: Tensor,
    recordings: list[Recording],
    chunks: Chunks,
    loss_of: _LossOf,
) -> float:
    """Compute the loss and run the backward pass layer by layer, from last to first."""
    layers = []
    for index in range(len(forward.layers)):
        layers.append(LayerGradient(forward, index, recordings, chunks, hidden_BTD))
        hidden_BTD = layers[-1].output()
    recordings[0].cache.release()
    loss, grad_BTD = loss_of(hidden_BTD)
    del hidden_BTD
    while layers:
        layers.pop().backward(grad_BTD)
    return loss


def _head(
    forward: LongForward,
    chunks: Chunks,
    inputs_BT: Tensor,
    targets_BT: Tensor,
    counted: int,
    hidden_BTD: Tensor,
) -> tuple[float, Tensor]:
    """Start the backward pass at the model's head: the loss, and its gradient at the head's input.

    Returns this process's share of the mean loss over the last ``counted`` tokens.
    """
    grad_BTD, total = forward.empty(hidden_BTD.shape, hidden_BTD.dtype), 0.0
    for span, place in chunks.own(forward.head_rows):
        first = max(span.start, targets_BT.shape[1] - counted)
        if first >= span.stop:
            grad_BTD[:, place] = 0
            continue
        grad_BTD[:, place.start : place.stop - (span.stop - first)] = 0
        span, place = slice(first, span.stop), slice(place.stop - (span.stop - first), place.stop)
        leaf = hidden_BTD[:, place].to(forward.device).detach().requires_grad_()
        with torch.enable_grad():
            logits = forward.logits(inputs_BT, leaf, span)
        loss, grad = loss_and_grad(logits.detach(), targets_BT[:, span], 1 / counted)
        logits.backward(grad)
        total += loss
        assert leaf.grad is not None
        grad_BTD[:, place] = leaf.grad
    return total / counted, grad_BTD


@contextlib.contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Disable gradients of the weights in the backward pass, which only needs the factors'."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()
