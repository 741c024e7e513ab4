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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache

from longrope.attention import chunked as attention
from longrope.attention.config import attention_shape
from longrope.compat import cache_name
from longrope.distributed import Team
from longrope.layerwise.chunks import Chunk, Chunks
from longrope.layerwise.decoder import find_layers
from longrope.layerwise.losses import ContinuationScore, answer_of, token_losses
from longrope.layerwise.stand_ins import Injector, LayerCache, Passing, Recorder, Recording
from longrope.layerwise.storage import allocate
from longrope.rope.rotary import column_layout, find_rotary

AttentionInterface.register(attention.NAME, attention.chunk_attention)
log = logging.getLogger(__name__)

# Short windows go through a model together, up to this many tokens.
BATCH_TOKENS = 4096
_T = TypeVar("_T")


def default_chunk(device_type: str) -> int:
    """Tokens that go through a layer at a time: a GPU waits for its next kernel with fewer."""
    return 8192 if device_type == "cuda" else 2048


def head_rows(vocabulary: int, device_type: str) -> int:
    """Rows of logits in memory at a time; on a GPU a gigabyte of them in float32."""
    return max(1024, 2**28 // vocabulary) if device_type == "cuda" else 1024


class Continuation(NamedTuple):
    """Tokens that stand, or might stand, in a row from the position ``first`` on."""

    row: int
    first: int
    tokens: Sequence[int]


class LongForward:
    """Per-token losses of sequences of any length.

    Args:
        model: a transformers causal language model in evaluation mode. The rescale
            that is installed in it when called applies to the whole sequence.
        chunk: tokens that go through a layer at a time; None: as fits the device
            (:func:`default_chunk`). Halved when a GPU runs out of memory, and left there.
        offload_activations: where the hidden states of the sequence wait; the model's
            device by default, the CPU to save GPU memory, a folder to save both (``waiting.py``).
        attention_name: what all attention goes through; ours by default.
        offloaded: the layers' weights come and go, so no graph may wait for them.
        team: the processes that share every sequence: at any time each has a chunk of it at work,
            all the same layer, and they give each other its keys and values.

    Raises:
        ValueError: the model's layers are not where a decoder keeps them.
    """

    def __init__(
        self,
        model: Any,
        chunk: int | None = None,
        offload_activations: torch.device | Path | None = None,
        attention_name: str = attention.NAME,
        offloaded: bool = False,
        team: Team | None = None,
    ):
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk is {chunk}; it must be at least 1 token")
        self.model = model
        self.decoder, self._layers_name = find_layers(model)
        self.device = next(model.parameters()).device
        self.chunk = chunk or default_chunk(self.device.type)
        self.vocabulary = model.config.get_text_config().vocab_size
        self.head_rows = head_rows(self.vocabulary, self.device.type)
        self.offload_activations = offload_activations or self.device
        self.attention_name = attention_name
        self.offloaded = offloaded
        self.team = team or Team()

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

        Raises:
            ValueError: a token id that the model has no embedding for.
        """
        if (largest := int(input_ids.max())) >= self.vocabulary:
            raise ValueError(
                f"the tokenizer gave the token id {largest:,}, and the model has "
                f"{self.vocabulary:,} embeddings: it is another model's"
            )
        ids_BT = input_ids.to(self.device)
        # A copy made out here is an ordinary tensor, that callers may change.
        return self.within_memory(lambda: self._losses(ids_BT)).clone()

    def answers(self, input_ids: Tensor, asked: Sequence[Continuation]) -> list[ContinuationScore]:
        """How likely some tokens are, each after all that stands before it in its row.

        Args:
            input_ids: shape (batch, tokens). Rows may be padded on the right, since no token
                sees what follows it. The tokens asked for need not be in it.
            asked: any number for each row.
        """
        ids_BT = input_ids.to(self.device)
        return self.within_memory(lambda: self._answers(ids_BT, asked))

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor) -> tuple[Tensor, DynamicCache]:
        """The logits after the last token, shape (batch, vocabulary), and the cache to go on with.

        The cache holds the keys and values of every layer, as the model's own forward
        would have left it.
        """
        ids_BT = input_ids.to(self.device)
        tokens = ids_BT.shape[1]
        chunks, last = self.chunks(tokens), slice(tokens - 1, tokens)
        cache = LayerCache(tokens, self.team, self.decoder.config)
        with self.attention():
            hidden_BTD = chunks.part(self._hidden(ids_BT, chunks, cache, keep=True), last)
            return self.logits(ids_BT, hidden_BTD, last)[:, -1], cache.whole

    def within_memory(self, compute: Callable[[], _T]) -> _T:
        """What ``compute`` gives, with a smaller chunk where a GPU runs out of memory."""
        while True:
            try:
                return compute()
            except torch.cuda.OutOfMemoryError:
                if self.chunk == 1 or self.team.size > 1:  # all of a team have the same chunks
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
        kinds = 1 if site.layer_type is None else len(set(config.layer_types))
        angles = 2 * len(column_layout(site)) * kinds
        ids, positions, losses = 8, 8, 2 * max(size, 4)
        kv = attention_shape(config).kv_numbers
        if self.device.type == "cpu" and size == 2:
            kv *= 2  # torch's flash kernel repacks keys and values for the bf16 matrix units
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
        return chunks.part(torch.cat(found, dim=1).cpu(), slice(0, chunks.tokens))

    @torch.inference_mode()
    def _answers(self, ids_BT: Tensor, asked: Sequence[Continuation]) -> list[ContinuationScore]:
        chunks = self.chunks(ids_BT.shape[1])
        with self.attention():
            hidden_BTD = self._hidden(ids_BT, chunks)
            answers = []
            for row, first, tokens in asked:
                before, rows = slice(first - 1, first - 1 + len(tokens)), slice(row, row + 1)
                hidden = chunks.part(hidden_BTD[rows], before)
                answers.append(answer_of(self.logits(ids_BT[rows], hidden, before)[0], tokens))
            return answers

    def _hidden(
        self, ids_BT: Tensor, chunks: Chunks, cache: LayerCache | None = None, keep: bool = False
    ) -> Tensor:
        """The last layer's output for this process's chunks.

        ``keep``: the keys and values of every layer, not only of the one at work.
        """
        own = chunks.own()
        cache = cache or LayerCache(ids_BT.shape[1], self.team, self.decoder.config)
        hidden_BTD, recordings = self.embed(ids_BT, own, cache)
        for index, layer in enumerate(self.layers):
            cache.begin()
            # One layer's keys and values at a time: the next layer writes over them.
            for number, (span, place) in enumerate(own):
                cache.start, cache.together = span.start, chunks.together(number)
                given, named = recordings[number].arguments[index]
                output = layer(hidden_BTD[:, place].to(self.device), *given, **named)
                hidden_BTD[:, place] = output if isinstance(output, Tensor) else output[0]
            if keep:
                cache.keep(index)
        return hidden_BTD

    def embed(
        self, ids_BT: Tensor, own: list[Chunk], cache: LayerCache
    ) -> tuple[Tensor, list[Recording]]:
        """The input of the first layer, and what else every layer gets, chunk by chunk."""
        hidden, recordings = None, []
        for span, place in own:
            recording = Recording(cache)
            stand_ins = [Recorder(layer, recording) for layer in self.layers]
            with self._exchanged(stand_ins):
                self.decoder(
                    input_ids=ids_BT[:, span],
                    position_ids=_positions(ids_BT, span),
                    use_cache=False,
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
        """Logits of a span from its part of the last layer's output, by the model's own head."""
        final = Injector(hidden_BTD.to(self.device))
        with self._exchanged([final, *[Passing() for _ in self.layers[1:]]]):
            return self.model(
                input_ids=ids_BT[:, span], position_ids=_positions(ids_BT, span), use_cache=False
            ).logits

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Room for what waits, where hidden states do."""
        return allocate(self.offload_activations, shape, dtype)

    def chunks(self, tokens: int) -> Chunks:
        """The chunks of a sequence, and which of them are this process's."""
        return Chunks(tokens, self.chunk, self.team)

    @contextlib.contextmanager
    def _exchanged(self, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
        layers = self.layers
        setattr(self.decoder, self._layers_name, nn.ModuleList(stand_ins))
        try:
            yield
        finally:
            setattr(self.decoder, self._layers_name, layers)

    def attention(self, name: str | None = None) -> contextlib.AbstractContextManager[None]:
        """All of the model's attention through ours; without a mask, which ours implies."""
        return attention.through(self.decoder.config, name or self.attention_name)


def _positions(ids_BT: Tensor, span: slice) -> Tensor:
    positions = torch.arange(*span.indices(ids_BT.shape[1]), device=ids_BT.device)
    return positions[None].expand(ids_BT.shape[0], -1)
