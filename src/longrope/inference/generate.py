"""Generate text from an extended model, token by token after a layer-by-layer prefill."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from longrope.compat import cache_name
from longrope.layerwise.forward import LongForward
from longrope.models.load import LoadedModel
from longrope.rope.apply import rescaled
from longrope.rope.rescale import Rescale

log = logging.getLogger(__name__)


def generate_tokens(
    loaded: LoadedModel,
    choose: Callable[[int], Rescale] | None,
    ids: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    forward: LongForward | None = None,
) -> Iterator[int]:
    """Generate text: yield new tokens up to the end-of-sequence token or ``max_new_tokens``.

    Where the sequence crosses from short factors to long ones it is prefilled again, so every
    token is exactly what it would be without a cache.

    Args:
        choose: returns the rescale for a number of tokens, such as :meth:`RescalePair.choose`;
            None leaves the model as it is.
        ids: token ids of the prompt.
        temperature: 0 takes the most likely token.
        seed: random seed.
        forward: the long forward pass to prefill with; by default the model's.

    Raises:
        ValueError: the prompt is empty.
    """
    if not ids:
        raise ValueError("prompt is empty; give some text")
    model, ids = loaded.model, list(ids)
    forward = forward or loaded.forward()
    chance = torch.Generator().manual_seed(seed)
    stop = model.generation_config.eos_token_id
    stops = set(stop if isinstance(stop, list) else [stop])
    end = len(ids) + max_new_tokens
    while len(ids) < end:  # one prefill, and another at the boundary
        rescale = choose(len(ids)) if choose else None
        with rescaled(model, rescale):
            logits, cache = forward.prefill(torch.tensor([ids]))
            while True:
                token = _pick(logits[0], temperature, chance)
                if token in stops:
                    return
                yield token
                ids.append(token)
                if len(ids) == end or (choose and choose(len(ids)) != rescale):
                    break
                logits = _next(model, ids, cache)


@torch.inference_mode()
def _next(model: Any, ids: list[int], cache: Any) -> Tensor:
    device = next(model.parameters()).device
    new = torch.tensor([ids[-1:]], device=device)
    position = torch.tensor([[len(ids) - 1]], device=device)
    cached = {cache_name(model): cache}
    return model(input_ids=new, position_ids=position, **cached).logits[:, -1]


def _pick(logits: Tensor, temperature: float, chance: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    shares = (logits.float().cpu() / temperature).softmax(dim=-1)
    return int(torch.multinomial(shares, 1, generator=chance))


def decode_tokens(loaded: LoadedModel, tokens: Iterator[int]) -> Iterator[str]:
    """Yield the text of generated tokens as they come, in whole characters."""
    seen: list[int] = []
    shown = ""
    for token in tokens:
        seen.append(token)
        text = loaded.tokenizer.decode(seen, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
