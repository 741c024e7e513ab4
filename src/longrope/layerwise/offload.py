"""Weights that wait on the host: layers pass through the device two at a time.

A long forward takes the layers one after the other, each over the whole sequence, so every weight
is needed once a sequence (twice for a slope), and while one layer works the next one's weights
can travel. transformers maps safetensors rather than reading them, so "the host" is the files
themselves, as far as the machine's memory does not hold them.
"""

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longrope.layerwise.decoder import find_layers


def offload(model: Any, device: torch.device) -> "Stream":
    """Move all of a model to a device but its layers, which follow whenever they are called.

    Right for any forward, and fast for one that is layer-major. The weights must not be trained.
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
    """Where a layer keeps one of its tensors."""

    module: nn.Module
    name: str

    def put(self, tensor: Tensor) -> None:
        if self.name in self.module._parameters:
            self.module._parameters[self.name].data = tensor  # type: ignore[union-attr]
        else:
            self.module._buffers[self.name] = tensor


class Stream:
    """Layers on their way: one at work on the device, the next one coming."""

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
        """A layer is about to work: have its weights here, and send for the next one's."""
        if index == self._here:
            return
        step = -1 if self._here is not None and index == self._here - 1 else 1
        self._put(self._here, None)
        self._here = None
        # Without this the next would come while kernels that wait in line still need the last.
        left = self._side and torch.cuda.current_stream(self.device).record_event()
        arrived = self._arrived(index, left)
        self._put(index, arrived)
        self._here = index
        following = index + step
        if 0 <= following < len(self.host):
            self._coming = following, self._porter.submit(self._fetch, following, left)

    def _arrived(self, index: int, left: Any) -> list[Tensor]:
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] == index:
            arrived = coming[1].result()
        else:
            if coming is not None:
                coming[1].result()  # let it come and go: never more than two are here
            del coming
            arrived = self._porter.submit(self._fetch, index, left).result()
        if self._side is not None:
            for tensor in arrived:  # their memory was taken on the other stream
                tensor.record_stream(torch.cuda.current_stream(self.device))
        return arrived

    def _fetch(self, index: int, left: Any = None) -> list[Tensor]:
        """Copies of a layer's tensors on the device, once another left; complete on return."""
        if left is not None:
            left.synchronize()
        with torch.cuda.stream(self._side):
            arrived = [t.to(self.device, copy=True) for t in self.host[index].values()]
        if self._side is not None:
            self._side.synchronize()
        return arrived

    def _put(self, index: int | None, tensors: list[Tensor] | None) -> None:
        if index is None:
            return
        held = self.host[index]
        for place, tensor in zip(held, tensors or held.values(), strict=True):
            place.put(tensor)


def _tensors(layer: nn.Module) -> dict[_Place, Tensor]:
    """A layer's tensors by where they are kept."""
    found = {}
    for module in layer.modules():
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                if tensor is not None:
                    found[_Place(module, name)] = tensor.data
    return found
