"""Training loss in chunks of tokens, without the logits of a whole sequence in memory."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from longrope.attention import autograd
from longrope.attention.chunked import attention_implementation
from longrope.attention.shape import explicit_scores, sliding_layers
from longrope.layerwise.decoder import find_layers
from longrope.layerwise.output_head import token_losses
from longrope.rope.apply import position_override, rescaled
from longrope.rope.rescale import Rescale
from longrope.stand_in import StandIn

# Rows of logits in memory at a time; a row has vocabulary × 4 bytes, and so has its gradient.
ROWS = 1024


@contextlib.contextmanager
def chunked_loss(
    model: Any, short: Rescale | None = None, *, teacher: Any = None, rows: int = ROWS
) -> Iterator[None]:
    """Compute the training loss in chunks of tokens within a ``with`` block.

    ``model(input_ids=…, weights=…)`` then returns ``{"loss": …}``, the mean over tokens of
    weight × negative log-likelihood in nats. The model's own head computes the logits of
    ``rows`` tokens at a time, and again in the backward pass, so memory does not grow with
    vocabulary × tokens, and the model's logit scaling and soft-cap apply.

    The model also accepts ``rotary_positions``, shape (batch, tokens), at which tokens are
    rotated, and ``short_ids``, shape (batch, windows, tokens): windows whose losses under the
    rescale ``short`` are added.

    Args:
        model: a transformers causal language model.
        short: rescale for the short windows; None for the original RoPE.
        teacher: a model of the same vocabulary. The loss of short windows is then the
            cross-entropy with its predictions, instead of the text's next tokens.
        rows: tokens whose logits are in memory at a time, at least one per window.
    """
    student = _SplitModel(model)
    taught_by = None if teacher is None else _SplitModel(teacher)
    heads = [head for head in (student, taught_by) if head is not None]

    def forward(
        input_ids: Tensor,
        weights: Tensor | None = None,
        short_ids: Tensor | None = None,
        rotary_positions: Tensor | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        if weights is None:
            weights = torch.ones_like(input_ids, dtype=torch.float32)
        with position_override(model, rotary_positions):
            total = _total_loss(student, input_ids, weights, rows)
        tokens = input_ids[:, 1:].numel()
        if short_ids is not None:
            windows = short_ids.flatten(0, 1)
            even = torch.ones_like(windows, dtype=torch.float32)
            with rescaled(model, short):
                total = total + _total_loss(student, windows, even, rows, taught_by)
            tokens += windows[:, 1:].numel()
        return {"loss": total / tokens}

    model.forward = forward
    try:
        with contextlib.ExitStack() as stack:
            for head in heads:
                stack.enter_context(head.attention())
            yield
    finally:
        del model.forward


def _total_loss(
    student: "_SplitModel",
    ids: Tensor,
    weights: Tensor,
    rows: int,
    teacher: "_SplitModel | None" = None,
) -> Tensor:
    """Sum weight × training loss over tokens, ``rows`` of them at a time."""
    taught = None
    if teacher is not None:
        with torch.no_grad():
            taught = teacher.hidden(ids)

    def chunk(
        hidden: Tensor, ids: Tensor, targets: Tensor, weights: Tensor, taught: Tensor | None
    ) -> Tensor:
        logits = student.logits(hidden, ids)
        if teacher is None or taught is None:
            losses = token_losses(logits, targets)
        else:
            exact = torch.promote_types(logits.dtype, torch.float32)
            with torch.no_grad():
                wanted = teacher.logits(taught, ids).softmax(-1, dtype=exact)
            losses = F.cross_entropy(
                logits.to(exact).flatten(0, 1), wanted.flatten(0, 1), reduction="none"
            ).view_as(targets)
        return (losses * weights).sum()

    hidden = student.hidden(ids)
    total = hidden.new_zeros((), dtype=torch.float32)
    each, last = max(1, rows // len(ids)), ids.shape[1] - 1
    for first in range(0, last, each):
        here = slice(first, min(first + each, last))
        following = slice(here.start + 1, here.stop + 1)
        total = total + checkpoint(
            chunk,
            hidden[:, here],
            ids[:, here],
            ids[:, following],
            weights[:, following],
            None if taught is None else taught[:, here],
            use_reentrant=False,
        )
    return total


class _SplitModel:
    """Model split into decoder and head, so that the training loss needs few logits at a time."""

    def __init__(self, model: Any):
        self._decoder, _ = find_layers(model)
        self._owner, self._name = _owner_of(model, self._decoder)
        self._forward = model.forward
        self._output: type[Any] = BaseModelOutputWithPast

    def hidden(self, ids: Tensor) -> Tensor:
        """Run the decoder for the training loss; hidden states have shape (batch, tokens, size)."""
        output = self._decoder(input_ids=ids, use_cache=False)
        # Mixture-of-experts outputs have more fields, which the head returns.
        self._output = type(output)
        return output.last_hidden_state

    def attention(self) -> contextlib.AbstractContextManager[None]:
        """Use longrope's attention in the training loss where transformers' needs quadratic memory.

        transformers' attention needs a mask or all scores for sliding windows, sinks (GPT-OSS) and
        soft-caps (Gemma 2). longrope's attention does not support attention dropout.
        """
        config: Any = self._decoder.config
        layers, _ = sliding_layers(config)
        if not (explicit_scores(config) or layers) or getattr(config, "attention_dropout", 0):
            return contextlib.nullcontext()
        return attention_implementation(config, autograd.TRAINED)

    def logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Compute one chunk's logits for the training loss, by the model's own head."""
        given = _GivenOutput(self._decoder, self._output(last_hidden_state=hidden))
        setattr(self._owner, self._name, given)
        try:
            return self._forward(input_ids=ids, use_cache=False).logits
        finally:
            setattr(self._owner, self._name, self._decoder)


def _owner_of(model: nn.Module, module: nn.Module) -> tuple[nn.Module, str]:
    for owner in model.modules():
        for name, child in owner.named_children():
            if child is module:
                return owner, name
    raise ValueError(f"{type(model).__name__} is its own decoder: it has no language-model head")


class _GivenOutput(StandIn):
    """Stand-in for the decoder in the training loss: returns an output computed before."""

    def __init__(self, decoder: nn.Module, output: Any):
        super().__init__(decoder)
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output
