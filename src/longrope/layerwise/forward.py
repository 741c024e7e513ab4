"""Layer-by-layer forward pass: token losses of sequences of any length in bounded memory.

Each layer runs over the whole sequence, chunk by chunk, before the next one starts; then its
keys and values are dropped. Memory holds the sequence's hidden states (offloaded on request),
one layer's keys and values, one chunk, and the weights. It never holds an attention mask or the
logits of the whole sequence.

There is no code per architecture. The model's own forward runs twice on each chunk with its
layers replaced: once by recorders, which record the layers' inputs (scaled embeddings, rotary
embeddings), and once by a layer that returns the final hidden states, so that the model applies
its own norm, head and soft-cap.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache

from longrope.attention import chunked as attention
from longrope.attention.shape import attention_shape
from longrope.compat import cache_name
from longrope.data.encoding import check_ids
from longrope.distributed import SequenceParallelGroup
from longrope.layerwise.activation_storage import allocate
from longrope.layerwise.chunks import Chunk, Chunks
from longrope.layerwise.decoder import find_layers
from longrope.layerwise.output_head import ContinuationScore, score_continuation, token_losses
from longrope.layerwise.stand_ins import Injector, LayerCache, PassThrough, Recorder, Recording
from longrope.rope.rotary import column_layout, find_rotary

AttentionInterface.register(attention.NAME, attention.chunk_attention)
log = logging.getLogger(__name__)

# Most tokens in a batch of short windows.
BATCH_TOKENS = 4096
_T = TypeVar("_T")


def default_chunk_size(device_type: str) -> int:
    """Return the default chunk size of a long forward pass: 8,192 tokens on a GPU, else 2,048.

    Fewer tokens do not keep a GPU busy.
    """
    return 8192 if device_type == "cuda" else 2048


def head_rows(vocabulary: int, device_type: str) -> int:
    """Return how many rows of logits a long forward pass computes at a time.

    On a GPU they take about 1 GB of float32.
    """
    return max(1024, 2**28 // vocabulary) if device_type == "cuda" else 1024


class Continuation(NamedTuple):
    """A continuation that the long forward pass scores: ``tokens`` from ``first`` on in ``row``.

    The row need not contain the tokens.
    """

    row: int
    first: int
    tokens: Sequence[int]


class LongForward:
    """Layer-by-layer forward pass of a model over sequences of any length.

    Args:
        model: a transformers causal language model in evaluation mode. The rescale in place when
            a method is called applies to the whole sequence.
        chunk_size: in tokens; default :func:`default_chunk_size`. Halved, and kept so, when a
            GPU runs out of memory.
        offload_activations: a device or directory for the sequence's hidden states; default the
            model's device.
        attention_name: name of the attention implementation, registered with transformers.
        offloaded: the layers' weights are offloaded, so no autograd graph may keep them.
        group: the sequence-parallel group. Each process works on a chunk of its own, all on the
            same layer, and they exchange keys and values.

    Raises:
        ValueError: the chunk size is below 1, the model's layers are not found, or its embeddings
            are not in memory.
    """

    def __init__(
        self,
        model: Any,
        chunk_size: int | None = None,
        offload_activations: torch.device | Path | None = None,
        attention_name: str = attention.NAME,
        offloaded: bool = False,
        group: SequenceParallelGroup | None = None,
    ):
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1 token")
        self.model = model
        self.decoder, self._layers_name = find_layers(model)
        self.device = next(model.parameters()).device
        if self.device.type == "meta":
            raise ValueError(
                "model has no embeddings in memory (offloaded by accelerate, perhaps): load it on "
                "one device, or give its path with offload_weights"
            )
        self.chunk_size = chunk_size or default_chunk_size(self.device.type)
        self.vocabulary = len(model.get_input_embeddings().weight)
        self.head_rows = head_rows(self.vocabulary, self.device.type)
        self.offload_activations = offload_activations or self.device
        self.attention_name = attention_name
        self.offloaded = offloaded
        self.group = group or SequenceParallelGroup()

    def on_device(self, input_ids: Tensor) -> Tensor:
        """Return token ids on the long forward's device, after checking them.

        Raises:
            ValueError: an id is outside the model's embeddings.
        """
        check_ids(input_ids, self.vocabulary, "input_ids")
        return input_ids.to(self.device)

    def batches(self, windows: np.ndarray) -> Iterator[Tensor]:
        """Run long forward passes over windows and yield token losses; short ones run as one batch.

        Args:
            windows: token ids, shape (windows, tokens).
        """
        ids = torch.from_numpy(windows.astype(np.int64))
        for batch in ids.split(max(1, BATCH_TOKENS // (ids.shape[1] - 1))):
            yield self.losses(batch)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers that the long forward runs one after another."""
        return getattr(self.decoder, self._layers_name)

    def losses(self, input_ids: Tensor) -> Tensor:
        """Run the long forward pass: the loss of each token but the first, in nats.

        Args:
            input_ids: shape (batch, tokens), unpadded, tokens ≥ 2.

        Returns:
            Shape (batch, tokens − 1), float32 (float64 in a float64 model), on the CPU.

        Raises:
            ValueError: a token id is outside the model's embeddings.
        """
        ids_BT = self.on_device(input_ids)
        # Outside inference mode the copy is an ordinary tensor, which callers may modify.
        return self.within_memory(lambda: self._losses(ids_BT)).clone()

    def score(
        self, input_ids: Tensor, continuations: Sequence[Continuation]
    ) -> list[ContinuationScore]:
        """Run the long forward pass, and score continuations of its rows.

        Each is scored given the tokens before it in its row.

        Args:
            input_ids: shape (batch, tokens); may be padded on the right, as no token attends to
                later ones. It need not contain the continuations' tokens.
            continuations: any number per row.

        Returns:
            A score per continuation, in order.

        Raises:
            ValueError: a token id is outside the model's embeddings.
        """
        for continuation in continuations:
            check_ids(np.array(continuation.tokens), self.vocabulary, "continuation")
        ids_BT = self.on_device(input_ids)
        return self.within_memory(lambda: self._score(ids_BT, continuations))

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor) -> tuple[Tensor, DynamicCache]:
        """Run the long forward pass over a prompt: last logits, and the cache for decoding.

        Args:
            input_ids: shape (batch, tokens).

        Returns:
            The logits, shape (batch, vocabulary), and a cache with the keys and values of every
            layer, as the model's own forward leaves it.

        Raises:
            ValueError: a token id is outside the model's embeddings.
        """
        ids_BT = self.on_device(input_ids)
        tokens = ids_BT.shape[1]
        chunks, last = self.chunks(tokens), slice(tokens - 1, tokens)
        cache = LayerCache(tokens, self.group, self.decoder.config)
        with self.attention():
            hidden_BTD = chunks.gather(self._hidden(ids_BT, chunks, cache, keep=True), last)
            return self.logits(ids_BT, hidden_BTD, last)[:, -1], cache.model_cache

    def within_memory(self, compute: Callable[[], _T]) -> _T:
        """Call ``compute``; retry with half the forward's chunk size if a GPU is out of memory."""
        while True:
            try:
                return compute()
            except torch.cuda.OutOfMemoryError:
                if self.chunk_size == 1 or self.group.size > 1:  # the group shares one chunk size
                    raise
                self.chunk_size //= 2
                log.warning("out of memory: retrying with chunk size %d", self.chunk_size)
            torch.cuda.empty_cache()

    def bytes_per_token(self) -> int:
        """Estimate the bytes per token by which the long forward pass's peak memory grows.

        Counts hidden states, one layer's keys and values, cosines and sines (per kind of layer),
        token ids, positions and losses.
        """
        model, site = self.model, find_rotary(self.model)
        assert site is not None
        config, size = self.decoder.config, model.dtype.itemsize
        kinds = 1 if site.layer_type is None else len(set(config.layer_types))
        angles = 2 * len(column_layout(site)) * kinds
        ids, positions, losses = 8, 8, 2 * max(size, 4)
        kv = attention_shape(config).kv_numbers
        if self.device.type == "cpu" and size == 2:
            kv *= 2  # torch's CPU flash kernel repacks keys and values in half precision
        numbers = config.hidden_size + kv + angles
        return numbers * size + ids + positions + losses

    @torch.inference_mode()
    def _losses(self, ids_BT: Tensor) -> Tensor:
        inputs_BT, targets_BT = ids_BT[:, :-1], ids_BT[:, 1:]
        chunks = self.chunks(inputs_BT.shape[1])
        with self.attention():
            hidden_BTD = self._hidden(inputs_BT, chunks)
            found = []
            for span, place in chunks.own(self.head_rows):
                logits = self.logits(inputs_BT, hidden_BTD[:, place], span)
                found.append(token_losses(logits, targets_BT[:, span]))
        return chunks.gather(torch.cat(found, dim=1).cpu(), slice(0, chunks.tokens))

    @torch.inference_mode()
    def _score(
        self, ids_BT: Tensor, continuations: Sequence[Continuation]
    ) -> list[ContinuationScore]:
        chunks = self.chunks(ids_BT.shape[1])
        with self.attention():
            hidden_BTD = self._hidden(ids_BT, chunks)
            answers = []
            for row, first, tokens in continuations:
                before, rows = slice(first - 1, first - 1 + len(tokens)), slice(row, row + 1)
                hidden = chunks.gather(hidden_BTD[rows], before)
                answers.append(
                    score_continuation(self.logits(ids_BT[rows], hidden, before)[0], tokens)
                )
            return answers

    def _hidden(
        self, ids_BT: Tensor, chunks: Chunks, cache: LayerCache | None = None, keep: bool = False
    ) -> Tensor:
        """Run all layers, one after another, over this process's chunks; return the last output.

        ``keep`` stores the keys and values of every layer in the cache, not only the current one's.
        """
        own = chunks.own()
        cache = cache or LayerCache(ids_BT.shape[1], self.group, self.decoder.config)
        hidden_BTD, recordings = self.embed(ids_BT, own, cache)
        for index, layer in enumerate(self.layers):
            cache.begin_layer()
            # The next layer overwrites this layer's keys and values.
            for number, (span, place) in enumerate(own):
                cache.begin_chunk(span.start, chunks.concurrent(number))
                given, named = recordings[number].arguments[index]
                output = layer(hidden_BTD[:, place].to(self.device), *given, **named)
                hidden_BTD[:, place] = output if isinstance(output, Tensor) else output[0]
            if keep:
                cache.keep_layer(index)
        return hidden_BTD

    def embed(
        self, ids_BT: Tensor, own: list[Chunk], cache: LayerCache
    ) -> tuple[Tensor, list[Recording]]:
        """Start the long forward pass: first layer's input, and all layers' recorded arguments."""
        hidden, recordings = None, []
        for span, place in own:
            recording = Recording(cache)
            stand_ins = [Recorder(layer, recording) for layer in self.layers]
            with self._exchanged(stand_ins):
                self.decoder(
                    input_ids=ids_BT[:, span],
                    position_ids=_positions(ids_BT, span),
                    use_cache=False,
                    **_nothing_recorded(self.model),
                    **{cache_name(self.decoder): cache},
                )
            embedded = recording.hidden
            assert embedded is not None
            if hidden is None:
                shape = (ids_BT.shape[0], own[-1].place.stop, embedded.shape[-1])
                hidden = self.empty(shape, embedded.dtype)
            hidden[:, place] = embedded
            recording.hidden = None
            recordings.append(recording)
        assert hidden is not None
        return hidden, recordings

    def logits(self, ids_BT: Tensor, hidden_BTD: Tensor, span: slice) -> Tensor:
        """End the long forward pass: apply the model's own head to a span of the last output."""
        final = Injector(hidden_BTD.to(self.device))
        with self._exchanged([final, *[PassThrough() for _ in self.layers[1:]]]):
            return self.model(
                input_ids=ids_BT[:, span],
                position_ids=_positions(ids_BT, span),
                use_cache=False,
                **_nothing_recorded(self.model),
            ).logits

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Allocate an uninitialised tensor where the long forward keeps hidden states."""
        return allocate(self.offload_activations, shape, dtype)

    def chunks(self, tokens: int) -> Chunks:
        """Split a sequence into chunks of the long forward's chunk size, for its group."""
        return Chunks(tokens, self.chunk_size, self.group)

    @contextlib.contextmanager
    def _exchanged(self, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
        """Replace the long forward's layers by stand-ins within a ``with`` block."""
        layers = self.layers
        setattr(self.decoder, self._layers_name, nn.ModuleList(stand_ins))
        try:
            yield
        finally:
            setattr(self.decoder, self._layers_name, layers)

    def attention(self, name: str | None = None) -> contextlib.AbstractContextManager[None]:
        """Use longrope's attention in the long forward's decoder within a ``with`` block.

        It is causal without a mask.
        """
        return attention.attention_implementation(self.decoder.config, name or self.attention_name)


def _positions(ids_BT: Tensor, span: slice) -> Tensor:
    positions = torch.arange(*span.indices(ids_BT.shape[1]), device=ids_BT.device)
    return positions[None].expand(ids_BT.shape[0], -1)


def _nothing_recorded(model: Any) -> dict[str, bool]:
    """Return the arguments with which a model records nothing of its layers, if its config asks.

    From ``output_router_logits`` it would compute a load-balancing loss of all layers, and at the
    first call transformers sets its recording hooks on the layers that it finds.
    """
    config = model.config.get_text_config()
    names = ("output_attentions", "output_hidden_states", "output_router_logits")
    return {name: False for name in names if getattr(config, name, False)}
