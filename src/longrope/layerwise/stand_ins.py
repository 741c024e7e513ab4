"""Stand-ins for a model's decoder layers and cache during a layer-by-layer pass."""

import functools
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from longrope.distributed import SequenceParallelGroup
from longrope.stand_in import StandIn

# Cache methods that layers with a recurrent state call.
_STATE_METHODS = {
    *("get_conv_state", "update_conv_state", "get_recurrent_state", "update_recurrent_state"),
    *("has_previous_state", "is_recording_past"),
}


class LayerCache:
    """Stand-in for a model's cache: keys and values of the current layer only.

    Holds those of the whole sequence, in memory that is allocated once. Each layer writes its
    current chunk and reads everything up to the chunk's end. In a sequence-parallel group each
    process writes the chunks of all processes, in rank order. Layers with a recurrent state keep it
    in :attr:`model_cache`, the model's own cache; keys and values are stored there on request.

    Args:
        tokens: length of the sequence.
        group: the sequence-parallel group.
        config: the decoder's config.
    """

    def __init__(self, tokens: int, group: SequenceParallelGroup, config: Any):
        self.tokens = tokens
        self.group = group
        self.config = config
        self._start = 0
        self._concurrent: Sequence[slice] = ()
        self.stateful = False  # whether the current layer uses a recurrent state
        self._buffers: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._latest: tuple[Tensor, Tensor] | None = None

    def update(
        self, key: Tensor, value: Tensor, layer: int | None = None, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a chunk's keys and values (B, K, C, D) in the cache; return all up to its end."""
        end = self._start + key.shape[2]
        shapes = tuple((*t.shape[:2], self.tokens, t.shape[3]) for t in (key, value))
        modes = getattr(self.config, "kv_sharing_modes", None) or ()
        # Layers of one shape share buffers, except where later layers reuse a layer's keys.
        lasts = layer is not None and "reuse" in modes and modes[layer] == "store"
        which = shapes, layer if lasts else None
        if which not in self._buffers:
            self._buffers[which] = (key.new_empty(shapes[0]), value.new_empty(shapes[1]))
        self._latest = self._buffers[which]
        for buffer, own in zip(self._latest, (key, value), strict=True):
            if not self._concurrent:
                buffer[:, :, self._start : end] = own
                continue
            longest = max(span.stop - span.start for span in self._concurrent)
            padded = F.pad(own, (0, 0, 0, longest - own.shape[2]))
            for span, found in zip(self._concurrent, self.group.gather(padded), strict=True):
                buffer[:, :, span] = found[:, :, : span.stop - span.start]
        keys, values = self._latest
        return keys[:, :, :end], values[:, :, :end]

    @functools.cached_property
    def model_cache(self) -> DynamicCache:
        """The model's own cache, beside the stand-in, or a plain one if it has no recurrent states.

        A plain one can be cropped.
        """
        try:
            own = DynamicCache(config=self.config)
        except Exception:  # transformers' cache does not support this config
            return DynamicCache()
        stateful = any(isinstance(layer, LinearAttentionLayer) for layer in own.layers)
        return own if stateful else DynamicCache()

    def begin_layer(self) -> None:
        """Prepare the stand-in cache for the next layer."""
        self._latest, self.stateful = None, False

    def begin_chunk(self, start: int, concurrent: Sequence[slice]) -> None:
        """Prepare the stand-in cache for the next chunk of the current layer.

        Args:
            start: position of its first token.
            concurrent: spans of the chunks that the group processes at the same time.
        """
        self._start, self._concurrent = start, concurrent

    @property
    def has_keys(self) -> bool:
        """Whether the current layer has stored keys in the stand-in cache."""
        return self._latest is not None

    def keep_layer(self, layer: int) -> None:
        """Copy the current layer's keys and values, if any, to :attr:`model_cache`."""
        if self._latest is not None:
            keys, values = self._latest
            self.model_cache.update(keys.clone(), values.clone(), layer)

    def __getattr__(self, name: str) -> Any:
        """Return a method for recurrent states from :attr:`model_cache`.

        Raises:
            ValueError: processes share the sequence, which recurrent states do not allow.
        """
        if name not in _STATE_METHODS:
            raise AttributeError(name)
        if self.group.size > 1:
            raise ValueError(
                "a layer of this model has a recurrent state, so processes cannot share a "
                "sequence: set sequence_parallel to 1"
            )
        self.stateful = True
        return getattr(self.model_cache, name)

    def release(self) -> None:
        """Free the stand-in cache's memory for keys and values."""
        self._buffers.clear()
        self.begin_layer()

    def get_seq_length(self, *_: Any) -> int:
        return self._start


class Recording:
    """Recorded layer inputs of one chunk: hidden states and each layer's arguments."""

    def __init__(self, cache: LayerCache):
        self.cache = cache
        self.hidden: Tensor | None = None
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []


class Recorder(StandIn):
    """Stand-in for a layer that records its arguments and returns the hidden states."""

    def __init__(self, layer: nn.Module, recording: Recording):
        super().__init__(layer)
        self.recording = recording

    def forward(self, hidden_states: Tensor, *given: Any, **named: Any) -> Tensor:
        if not self.recording.arguments:
            self.recording.hidden = hidden_states
        self.recording.arguments.append((given, named))
        return hidden_states


class Injector(nn.Module):
    """Stand-in for a layer that returns the given hidden states, whatever its input."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.hidden


class PassThrough(nn.Module):
    """Stand-in for a layer that returns its input."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states
