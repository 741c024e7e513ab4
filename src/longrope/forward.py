"""The long forward: the loss of every token of a sequence of any length, in bounded memory.

Layer-major: each layer runs over the whole sequence, chunk by chunk, before the
next one starts; then its keys and values are dropped. So memory holds the hidden
states of the sequence (on the host if asked), one layer's keys and values, one
chunk, and the weights; never a mask of the sequence, never all logits.

There is no code per architecture. The model's own forward is run on each chunk
twice with its layers exchanged: once with recorders, to learn what it feeds its
layers (scaled embeddings, rotary angles), and once with a layer that returns the
final hidden states, to let it apply its own norm, head and soft-cap.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from longrope import attention
from longrope.rope.install import column_layout, find_rotary

AttentionInterface.register(attention.NAME, attention.chunk_attention)
log = logging.getLogger(__name__)

DEFAULT_CHUNK = 2048
# Short windows go through a model together, up to this many tokens.
BATCH_TOKENS = 4096
# Rows of logits in memory at a time; a row is vocabulary × 4 bytes.
_HEAD_ROWS = 1024


class LongForward:
    """Per-token losses of sequences of any length.

    Args:
        model: a transformers causal language model in evaluation mode. The rescale
            that is installed in it when called applies to the whole sequence.
        chunk: tokens that go through a layer at a time. Halved when a GPU runs out
            of memory, and left there.
        hidden_device: where the hidden states of the sequence wait; the model's
            device by default, the CPU to save GPU memory.
        attention_name: what all attention goes through; ours by default.

    Raises:
        ValueError: the model's layers are not where a decoder keeps them.
    """

    def __init__(
        self,
        model: Any,
        chunk: int = DEFAULT_CHUNK,
        hidden_device: torch.device | None = None,
        attention_name: str = attention.NAME,
    ):
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}; it must be at least 1 token")
        self.model = model
        self.chunk = chunk
        self.decoder, self._layers_name = find_layers(model)
        self.device = next(model.parameters()).device
        self.hidden_device = hidden_device or self.device
        self.attention_name = attention_name

    def batches(self, windows: np.ndarray) -> Iterator[Tensor]:
        """Losses of windows of one length, shape (windows, tokens): short ones go together."""
        ids = torch.from_numpy(windows.astype(np.int64))
        for batch in ids.split(max(1, BATCH_TOKENS // (ids.shape[1] - 1))):
            yield self.losses(batch)

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self.decoder, self._layers_name)

    def losses(self, input_ids: Tensor) -> Tensor:
        """Negative log-likelihood in nats of each token but the first.

        Args:
            input_ids: shape (batch, tokens), unpadded, tokens ≥ 2.

        Returns:
            Shape (batch, tokens − 1), float32 (float64 in a float64 model), on the CPU.
        """
        while True:
            try:
                # A copy made out here is an ordinary tensor, that callers may change.
                return self._losses(input_ids.to(self.device)).clone()
            except torch.cuda.OutOfMemoryError:
                if self.chunk == 1:
                    raise
                self.chunk //= 2
                log.warning("out of memory: going on with --chunk %d", self.chunk)
            torch.cuda.empty_cache()

    def bytes_per_token(self) -> int:
        """By how much peak memory grows with each token, beside a constant.

        Hidden states, one layer's keys and values, cosines and sines (one set for each
        kind of layer), token ids and positions going in and losses coming out.
        """
        model, site = self.model, find_rotary(self.model)
        assert site is not None
        config, size = self.decoder.config, model.dtype.itemsize
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        kinds = 1 if site.layer_type is None else len(set(config.layer_types))
        angles = 2 * len(column_layout(site)) * kinds
        ids, positions, losses = 8, 8, 2 * max(size, 4)
        kv = 2 * heads * head_dim
        if self.device.type == "cpu" and size == 2:
            kv *= 2  # torch's flash kernel repacks keys and values for the bf16 matrix units
        numbers = config.hidden_size + kv + angles
        return numbers * size + ids + positions + losses

    @torch.inference_mode()
    def _losses(self, ids_BT: Tensor) -> Tensor:
        inputs_BT, targets_BT = ids_BT[:, :-1], ids_BT[:, 1:]
        with self._attention():
            spans = self._spans(inputs_BT.shape[1], self.chunk)
            hidden_BTD, recordings = self._embed(inputs_BT, spans)
            for index, layer in enumerate(self.layers):
                # One layer's keys and values at a time: the next layer writes over them.
                for span, recording in zip(spans, recordings, strict=True):
                    recording.cache.start = span.start
                    chunk = hidden_BTD[:, span].to(self.device)
                    output = layer(chunk, **recording.arguments[index])
                    hidden_BTD[:, span] = output if isinstance(output, Tensor) else output[0]
            del recordings
            return self._head(inputs_BT, targets_BT, hidden_BTD)

    def _embed(self, ids_BT: Tensor, spans: list[slice]) -> tuple[Tensor, list["_Recording"]]:
        """The input of the first layer, and what else every layer gets, chunk by chunk."""
        cache = _LayerCache(ids_BT.shape[1])
        hidden, recordings = None, []
        for span in spans:
            recording = _Recording(cache)
            stand_ins = [_Recorder(layer, recording) for layer in self.layers]
            with self._exchanged(stand_ins):
                self.decoder(
                    input_ids=ids_BT[:, span],
                    position_ids=_positions(ids_BT, span),
                    past_key_values=cache,
                    use_cache=False,
                )
            embedded = recording.hidden
            assert embedded is not None
            if hidden is None:
                shape = (*ids_BT.shape, embedded.shape[-1])
                hidden = torch.empty(shape, dtype=embedded.dtype, device=self.hidden_device)
            hidden[:, span] = embedded
            recording.hidden = None
            recordings.append(recording)
        assert hidden is not None
        return hidden, recordings

    def _head(self, ids_BT: Tensor, targets_BT: Tensor, hidden_BTD: Tensor) -> Tensor:
        """Losses from the last layer's output, by the model's own norm and head."""
        losses = []
        for span in self._spans(ids_BT.shape[1], min(self.chunk, _HEAD_ROWS)):
            final = _Injector(hidden_BTD[:, span].to(self.device))
            with self._exchanged([final, *[_Passing() for _ in self.layers[1:]]]):
                logits = self.model(
                    input_ids=ids_BT[:, span],
                    position_ids=_positions(ids_BT, span),
                    use_cache=False,
                ).logits
            targets = targets_BT[:, span]
            exact = torch.promote_types(logits.dtype, torch.float32)
            loss = F.cross_entropy(
                logits.to(exact).flatten(0, 1), targets.flatten(), reduction="none"
            )
            losses.append(loss.view_as(targets).cpu())
        return torch.cat(losses, dim=1)

    @staticmethod
    def _spans(tokens: int, chunk: int) -> list[slice]:
        return [slice(s, min(s + chunk, tokens)) for s in range(0, tokens, chunk)]

    @contextlib.contextmanager
    def _exchanged(self, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
        layers = self.layers
        setattr(self.decoder, self._layers_name, nn.ModuleList(stand_ins))
        try:
            yield
        finally:
            setattr(self.decoder, self._layers_name, layers)

    @contextlib.contextmanager
    def _attention(self) -> Iterator[None]:
        """All of the model's attention through ours; without a mask, which ours implies."""
        config = self.decoder.config
        before = config._attn_implementation
        config._attn_implementation = self.attention_name
        try:
            yield
        finally:
            config._attn_implementation = before


def find_layers(model: nn.Module) -> tuple[Any, str]:
    """The decoder of a model and the name under which it keeps its layers.

    Raises:
        ValueError: there is no list of as many layers as the config says.
    """
    site = find_rotary(model)
    if site is not None:
        expected = site.owner.config.num_hidden_layers  # type: ignore[union-attr]
        for name, child in site.owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == expected:
                return site.owner, name
    raise ValueError(f"{type(model).__name__} has no list of decoder layers beside a rotary module")


def _positions(ids_BT: Tensor, span: slice) -> Tensor:
    positions = torch.arange(span.start, span.stop, device=ids_BT.device)
    return positions[None].expand(ids_BT.shape[0], -1)


class _LayerCache:
    """Keys and values of the layer at work, for the whole sequence; allocated once.

    Passed to the model as its cache. Every layer writes the chunk at ``start`` and
    reads all up to its end.
    """

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.start = 0
        self._buffers: dict[tuple, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        end = self.start + key.shape[2]
        shapes = tuple((*t.shape[:2], self.tokens, t.shape[3]) for t in (key, value))
        if shapes not in self._buffers:  # layers of one shape share a pair
            self._buffers[shapes] = (key.new_empty(shapes[0]), value.new_empty(shapes[1]))
        keys, values = self._buffers[shapes]
        keys[:, :, self.start : end] = key
        values[:, :, self.start : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, *_: Any) -> int:
        return self.start


class _Recording:
    """What one chunk's forward gave its layers."""

    def __init__(self, cache: _LayerCache):
        self.cache = cache
        self.hidden: Tensor | None = None
        self.arguments: list[dict[str, Any]] = []


class _Recorder(nn.Module):
    """Stands in for a layer: notes its arguments and passes the hidden states on."""

    def __init__(self, layer: nn.Module, recording: _Recording):
        super().__init__()
        self._held = (layer, recording)  # in a tuple: no submodule of ours

    def __getattr__(self, name: str) -> Any:
        if name == "_held":
            return super().__getattr__(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._held[0], name)  # some models ask a layer for its kind

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        _, recording = self._held
        if not recording.arguments:
            recording.hidden = hidden_states
        recording.arguments.append(arguments)
        return hidden_states


class _Injector(nn.Module):
    """Stands in for a layer: whatever comes in, the given hidden states go out."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.hidden


class _Passing(nn.Module):
    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states
