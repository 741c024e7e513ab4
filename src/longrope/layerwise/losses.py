"""What logits say of the tokens that follow them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits that a CPU turns into losses at a time: they stay in its cache, and in pages it has.
_NUMBERS = 2**20


class ContinuationScore(NamedTuple):
    """The log-likelihood of tokens in nats, and whether greedy decoding would give them."""

    log_likelihood: float
    greedy: bool


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Negative log-likelihoods in nats, shape (B, T), in float32 or better."""
    exact = torch.promote_types(logits_BTV.dtype, torch.float32)
    parts = [
        F.cross_entropy(logits.to(exact), targets, reduction="none")
        for logits, targets in _in_parts(logits_BTV, targets_BT)
    ]
    return torch.cat(parts).view_as(targets_BT)


@torch.no_grad()
def loss_and_grad(logits_BTV: Tensor, targets_BT: Tensor, weight: float) -> tuple[float, Tensor]:
    """The sum of the losses in nats, and by the logits the slope of ``weight`` times it.

    The slope, (softmax − 1 at the target) × weight, is what autograd would give, which keeps all
    of the logits in float32 for it, and their softmax.
    """
    exact = torch.promote_types(logits_BTV.dtype, torch.float32)
    slope_BTV, total = logits_BTV.new_empty(logits_BTV.shape), 0.0
    for logits, targets, slope in _in_parts(logits_BTV, targets_BT, slope_BTV):
        at = targets[:, None]
        found = logits.log_softmax(-1, dtype=exact)
        total -= found.gather(-1, at).sum().item()
        found.exp_().scatter_add_(-1, at, -torch.ones_like(at, dtype=exact))
        slope.copy_(found.mul_(weight))
    return total, slope_BTV


def answer_of(logits_TV: Tensor, tokens: Sequence[int]) -> ContinuationScore:
    """Of tokens, by the logits that each of them follows."""
    tokens_T = torch.tensor(tokens, device=logits_TV.device)
    loss = token_losses(logits_TV[None], tokens_T[None]).sum()
    return ContinuationScore(-loss.item(), bool((logits_TV.argmax(dim=-1) == tokens_T).all()))


def _in_parts(logits_BTV: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows at a time on a CPU, one for each thread at least; all at once elsewhere."""
    some = max(torch.get_num_threads(), _NUMBERS // logits_BTV.shape[-1])
    if logits_BTV.device.type != "cpu":
        some = logits_BTV.shape[:2].numel()
    each = (tensor.flatten(0, 1).split(some) for tensor in (logits_BTV, *others))
    return zip(*each, strict=True)
