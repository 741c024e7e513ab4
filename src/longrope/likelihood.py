"""What logits say of the tokens that follow them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits that a CPU turns into losses at a time: they stay in its cache, and in pages it has.
_NUMBERS = 2**20


class Answer(NamedTuple):
    """The log-likelihood of tokens in nats, and whether greedy decoding would give them."""

    log_likelihood: float
    greedy: bool


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Negative log-likelihoods in nats, shape (B, T), in float32 or better."""
    parts = [
        F.cross_entropy(_exact(logits), targets, reduction="none")
        for logits, targets in _in_parts(logits_BTV, targets_BT)
    ]
    return torch.cat(parts).view_as(targets_BT)


@torch.no_grad()
def loss_and_slope(logits_BTV: Tensor, targets_BT: Tensor, weight: float) -> tuple[float, Tensor]:
    """The sum of the losses in nats, and by the logits the slope of ``weight`` times it.

    What autograd would give, (softmax - 1 at the target) x weight, without a second and a third
    copy of the logits in float32.
    """
    slope_BTV, total = torch.empty_like(logits_BTV), 0.0
    for (logits, targets), (slope, _) in zip(
        _in_parts(logits_BTV, targets_BT), _in_parts(slope_BTV, targets_BT), strict=True
    ):
        found = _exact(logits).log_softmax(-1)
        at = targets[:, None]
        total -= found.gather(-1, at).sum().item()
        found.exp_().scatter_add_(-1, at, -torch.ones_like(at, dtype=found.dtype))
        slope.copy_(found.mul_(weight))
    return total, slope_BTV


def _in_parts(logits_BTV: Tensor, targets_BT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time on a CPU, all at once elsewhere."""
    rows, targets = logits_BTV.flatten(0, 1), targets_BT.flatten()
    some = len(rows) if rows.device.type != "cpu" else max(1, _NUMBERS // rows.shape[1])
    return zip(rows.split(some), targets.split(some), strict=True)


def _exact(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def answer_of(logits_TV: Tensor, tokens: Sequence[int]) -> Answer:
    """Of tokens, by the logits that each of them follows."""
    tokens_T = torch.tensor(tokens, device=logits_TV.device)
    loss = token_losses(logits_TV[None], tokens_T[None]).sum()
    return Answer(-loss.item(), bool((logits_TV.argmax(dim=-1) == tokens_T).all()))
