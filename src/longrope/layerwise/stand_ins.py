"""A model's decoder layers, and what stands in for them while the long forward is at work."""

import functools
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from longrope.distributed import Team

# What a layer without attention does with the cache of its model.
_STATES = {
    *("get_conv_state", "update_conv_state", "get_recurrent_state", "update_recurrent_state"),
    *("has_previous_state", "is_recording_past"),
}


class LayerCache:
    """Keys and values of the layer at work, for the whole sequence; allocated once.

    Passed to the model as its cache. Every layer writes the chunk at ``start`` and
    reads all up to its end. Where a team shares the sequence, each process writes the chunks of all
    of them: ``together``, in the order of the team. Layers without attention, which go on from a
    state, keep that in ``whole``, the model's own cache, where keys and values come if asked for.
    """

    def __init__(self, tokens: int, team: Team, config: Any):
        self.tokens = tokens
        self.team = team
        self.config = config
        self.start = 0
        self.together: Sequence[slice] = ()
        self.stateful = False  # whether the layer at work has come with a state
        self._buffers: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._latest: tuple[Tensor, Tensor] | None = None

    def update(
        self, key: Tensor, value: Tensor, layer: int | None = None, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        end = self.start + key.shape[2]
        shapes = tuple((*t.shape[:2], self.tokens, t.shape[3]) for t in (key, value))
        modes = getattr(self.config, "kv_sharing_modes", None) or ()
        # Layers of one shape share a pair, but for those at whose keys later layers look.
        lasts = layer is not None and "reuse" in modes and modes[layer] == "store"
        which = shapes, layer if lasts else None
        if which not in self._buffers:
            self._buffers[which] = (key.new_empty(shapes[0]), value.new_empty(shapes[1]))
        self._latest = self._buffers[which]
        for buffer, own in zip(self._latest, (key, value), strict=True):
            if not self.together:
                buffer[:, :, self.start : end] = own
                continue
            longest = max(span.stop - span.start for span in self.together)
            padded = F.pad(own, (0, 0, 0, longest - own.shape[2]))
            for span, found in zip(self.together, self.team.gather(padded), strict=True):
                buffer[:, :, span] = found[:, :, : span.stop - span.start]
        keys, values = self._latest
        return keys[:, :, :end], values[:, :, :end]

    @functools.cached_property
    def whole(self) -> DynamicCache:
        """The model's own cache; where there are no states one that can be cropped."""
        try:
            own = DynamicCache(config=self.config)
        except Exception:  # a config that transformers' own cache does not know
            return DynamicCache()
        stateful = any(isinstance(layer, LinearAttentionLayer) for layer in own.layers)
        return own if stateful else DynamicCache()

    def begin(self) -> None:
        """Another layer."""
        self._latest, self.stateful = None, False

    @property
    def has_keys(self) -> bool:
        """Whether the layer at work has come with keys."""
        return self._latest is not None

    def keep(self, layer: int) -> None:
        """The keys and values of the layer at work, if it has any, in :attr:`whole`."""
        if self._latest is not None:
            keys, values = self._latest
            self.whole.update(keys.clone(), values.clone(), layer)

    def __getattr__(self, name: str) -> Any:
        """What layers with a state ask for, and set."""
        if name not in _STATES:
            raise AttributeError(name)
        if self.team.size > 1:
            raise ValueError(
                "a layer of this model goes on from a state of all tokens before it, so processes "
                "cannot share a sequence; leave --sequence-parallel out"
            )
        self.stateful = True
        return getattr(self.whole, name)

    def forget(self) -> None:
        """Give the memory back."""
        self._buffers.clear()
        self.begin()

    def get_seq_length(self, *_: Any) -> int:
        return self.start


class Recording:
    """What one chunk's forward gave its layers."""

    def __init__(self, cache: LayerCache):
        self.cache = cache
        self.hidden: Tensor | None = None
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []


class Recorder(nn.Module):
    """Stands in for a layer: notes its arguments and passes the hidden states on."""

    def __init__(self, layer: nn.Module, recording: Recording):
        super().__init__()
        self._held = (layer, recording)  # in a tuple: no submodule of ours

    def __getattr__(self, name: str) -> Any:
        if name == "_held":
            return super().__getattr__(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._held[0], name)  # some models ask a layer for its kind

    def forward(self, hidden_states: Tensor, *given: Any, **named: Any) -> Tensor:
        _, recording = self._held
        if not recording.arguments:
            recording.hidden = hidden_states
        recording.arguments.append((given, named))
        return hidden_states


class Injector(nn.Module):
    """Stands in for a layer: whatever comes in, the given hidden states go out."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.hidden


class Passing(nn.Module):
    """Stands in for a layer that does nothing."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states
