"""Verify on a loaded model that rescaling and the layer-by-layer forward pass are correct."""

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from longrope.attention import chunked as attention
from longrope.attention.shape import sliding_layers
from longrope.errors import first_line
from longrope.layerwise.forward import LongForward
from longrope.models.info import ModelInfo
from longrope.rope.apply import rescaled
from longrope.rope.rescale import Rescale

log = logging.getLogger(__name__)

_TOKENS = 24
_NOTING, _NEAR = "longrope_noting", "longrope_near"


@torch.inference_mode()
def incompatibility(model: Any, base: Rescale) -> str | None:
    """Return why a model cannot be extended, or None if it can, from forward passes of 24 tokens.

    Verifies that a rescale changes the logits (in the LongRoPE authors' code it silently does
    nothing on current models), that the layer-by-layer forward pass returns the model's own
    losses, and that the attention is called with the sliding windows of the config.

    Args:
        base: the rescale that an extension starts from.
    """
    config = model.config.get_text_config()
    ids, stretched = _ids(model), _stretched(base)
    try:
        with rescaled(model, base):
            before = model(input_ids=ids, use_cache=False).logits
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # such as a model that needs audio
        said = f"{type(error).__name__}: {first_line(error)}"
        return f"transformers' own forward of a text fails ({said})"
    if not before.isfinite().all():
        bad = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
        which = f"; {len(bad)} weight tensors are not, the first is {bad[0]}" if bad else ""
        remedy = "; try bfloat16 or float32" if before.dtype is torch.float16 else ""
        dtype = str(before.dtype).removeprefix("torch.")
        return f"its logits are not finite in {dtype}{which}{remedy}"
    with rescaled(model, stretched):
        logits = model(input_ids=ids, use_cache=False).logits
        if torch.equal(before, logits):
            return "a rescale does not change its logits"
        try:
            whole, chunked = (LongForward(model, chunk).losses(ids) for chunk in (_TOKENS, 10))
            windows = _windows_seen(model, ids)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # an unknown layer may raise anything
            return f"its layers do not run in the long forward ({type(error).__name__}: {error})"
    expected = -logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].cpu()
    # The median: in bf16, rounding moves single tokens of some models by a nat.
    off = max(_median_off(found, expected) for found in (whole, chunked))
    allowed = 0.05 if before.dtype.itemsize < 4 else 0.01
    if off > allowed * max(1.0, expected.median().item()):
        return f"the long forward gives other losses than the model itself (by {off:.3g} nats)"
    _, window = sliding_layers(config)
    if window is not None and window not in windows:
        return f"its sliding window of {window:,} tokens is in a mask, not in its attention's call"
    return None


@torch.inference_mode()
def effective_window(model: Any, base: Rescale) -> int | None:
    """Test whether a sliding window limits every layer with RoPE of a loaded model.

    Returns the window in tokens, or None.

    No rescale helps such a model beyond its window: every layer of Mistral 7B v0.1 has one, and
    Cohere 2's full-attention layers have no RoPE. Tested with windows of one token, where RoPE
    has no effect: then the factors change no loss.
    """
    _, window = sliding_layers(model.config.get_text_config())
    if window is None:
        return None

    def near(*args: Any, sliding_window: int | None = None, **options: Any) -> Any:
        return attention.chunk_attention(*args, sliding_window=sliding_window and 1, **options)

    AttentionInterface.register(_NEAR, near)
    losses = []
    for rescale in (base, _stretched(base)):
        with rescaled(model, rescale):
            losses.append(LongForward(model, _TOKENS, attention_name=_NEAR).losses(_ids(model)))
    return window if torch.equal(*losses) else None


def _ids(model: Any) -> Tensor:
    device = next(model.parameters()).device
    ids = torch.arange(1, _TOKENS + 1, device=device)[None]
    return ids % model.config.get_text_config().vocab_size


def _stretched(base: Rescale) -> Rescale:
    return base.replace(factors=tuple(3.0 * factor for factor in base.factors))


def _median_off(found: Tensor, expected: Tensor) -> float:
    return (found - expected).abs().median().item()


def _windows_seen(model: Any, ids: Tensor) -> set[int | None]:
    """Observe the sliding windows that a loaded model's layers pass to their attention."""
    seen: set[int | None] = set()

    def noting(*args: Any, sliding_window: int | None = None, **options: Any) -> Any:
        seen.add(sliding_window)
        return attention.chunk_attention(*args, sliding_window=sliding_window, **options)

    AttentionInterface.register(_NOTING, noting)
    LongForward(model, _TOKENS, attention_name=_NOTING).losses(ids)
    return seen


def warn_if_out_of_reach(model: Any, info: ModelInfo, target: int) -> None:
    """Warn if the target is beyond the :func:`effective_window` of a loaded model."""
    window = effective_window(model, info.rescale("none", target))
    if window is not None and window < target:
        log.warning(
            "%s: all its layers with RoPE have a sliding window of %s tokens; no factors extend "
            "its context beyond that (see docs/method.md)",
            info.source,
            f"{window:,}",
        )
