"""Weight offloading: stream layer weights from the host to the device, two layers at a time.

A layer-by-layer forward pass needs each layer's weights once per sequence (twice for a
gradient), so the next layer's weights are copied while the current layer computes. transformers
memory-maps safetensors, so the host copy is the checkpoint file as far as memory does not
cache it.
"""

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longrope.layerwise.decoder import find_layers


def offload(model: Any, device: torch.device) -> "Stream":
    """Move a model to a device, but offload its layers: weights are copied when called.

    Correct for any forward pass, and fast for a layer-by-layer one. The weights must not be
    trained.
    """
    decoder, name = find_layers(model)
    layers = getattr(decoder, name)
    setattr(decoder, name, nn.ModuleList())
    try:
        model.to(device)
    finally:
        setattr(decoder, name, layers)
    return Stream(list(layers), device)


class _Place(NamedTuple):
    """Location of one of a layer's weights: a module, and the name of a parameter or buffer."""

    module: nn.Module
    name: str

    def put(self, tensor: Tensor) -> None:
        """Point a layer's parameter or buffer to another copy of its weights."""
        if self.name in self.module._parameters:
            self.module._parameters[self.name].data = tensor  # type: ignore[union-attr]
        else:
            self.module._buffers[self.name] = tensor


class Stream:
    """Stream of offloaded weights: the current layer's on the device, the next in transfer."""

    def __init__(self, layers: list[nn.Module], device: torch.device):
        self.device = device
        self.host = [_tensors(layer) for layer in layers]
        self.largest = max(sum(t.nbytes for t in found.values()) for found in self.host)
        self._here: int | None = None
        self._coming: tuple[int, Future[list[Tensor]]] | None = None
        self._porter = ThreadPoolExecutor(1, "weights")
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(functools.partial(self._enter, index))

    def _enter(self, index: int, *_: Any) -> None:
        """Forward pre-hook: put a layer's weights on the device, and start copying the next's."""
        if index == self._here:
            return
        step = -1 if self._here is not None and index == self._here - 1 else 1
        self._put(self._here, None)
        self._here = None
        # Else the next layer would be copied while queued kernels still use the last one's weights.
        left = self._side and torch.cuda.current_stream(self.device).record_event()
        arrived = self._arrived(index, left)
        self._put(index, arrived)
        self._here = index
        following = index + step
        if 0 <= following < len(self.host):
            self._coming = following, self._porter.submit(self._fetch, following, left)

    def _arrived(self, index: int, left: Any) -> list[Tensor]:
        """Return a layer's weights on the device, waiting for their transfer if needed."""
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] == index:
            arrived = coming[1].result()
        else:
            if coming is not None:
                coming[1].result()  # finish and drop it: at most two layers are on the device
            del coming
            arrived = self._porter.submit(self._fetch, index, left).result()
        if self._side is not None:
            for tensor in arrived:  # allocated on the side stream
                tensor.record_stream(torch.cuda.current_stream(self.device))
        return arrived

    def _fetch(self, index: int, left: Any = None) -> list[Tensor]:
        """Copy a layer's weights from the host to the device, after the event ``left``.

        The copy is complete on return.
        """
        if left is not None:
            left.synchronize()
        with torch.cuda.stream(self._side):
            arrived = [t.to(self.device, copy=True) for t in self.host[index].values()]
        if self._side is not None:
            self._side.synchronize()
        return arrived

    def _put(self, index: int | None, tensors: list[Tensor] | None) -> None:
        """Assign a layer's weights; None restores those on the host."""
        if index is None:
            return
        held = self.host[index]
        for place, tensor in zip(held, tensors or held.values(), strict=True):
            place.put(tensor)


def _tensors(layer: nn.Module) -> dict[_Place, Tensor]:
    """Map the location of each of a layer's weights to its tensor on the host."""
    found = {}
    for module in layer.modules():
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                if tensor is not None:
                    found[_Place(module, name)] = tensor.data
    return found
