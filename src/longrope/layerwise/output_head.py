"""Token losses and continuation scores from logits."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits that a CPU processes at a time, so that they stay in its cache.
_LOGITS_AT_ONCE = 2**20


class ContinuationScore(NamedTuple):
    """Score of a continuation from its logits: log-likelihood in nats, and whether it is greedy.

    It is greedy if every token is the one with the largest logit.
    """

    log_likelihood: float
    greedy: bool


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Compute token losses in nats from logits, shape (B, T), in float32 or better."""
    exact = torch.promote_types(logits_BTV.dtype, torch.float32)
    parts = [
        F.cross_entropy(logits.to(exact), targets, reduction="none")
        for logits, targets in _in_parts(logits_BTV, targets_BT)
    ]
    return torch.cat(parts).view_as(targets_BT)


@torch.no_grad()
def loss_and_grad(logits_BTV: Tensor, targets_BT: Tensor, weight: float) -> tuple[float, Tensor]:
    """Compute the summed token loss in nats from logits, and ``weight`` times its gradient.

    The gradient at the logits is (softmax − 1 at the target) × weight. Autograd would keep float32
    copies of all logits and their softmax for it.

    Args:
        logits_BTV: shape (B, T, V).
        targets_BT: shape (B, T).
        weight: factor of the gradient, not of the loss.

    Returns:
        The sum of the losses, and the gradient, shape (B, T, V), in the logits' dtype.
    """
    exact = torch.promote_types(logits_BTV.dtype, torch.float32)
    grad_BTV, total = logits_BTV.new_empty(logits_BTV.shape), 0.0
    for logits, targets, grad in _in_parts(logits_BTV, targets_BT, grad_BTV):
        at = targets[:, None]
        found = logits.log_softmax(-1, dtype=exact)
        total -= found.gather(-1, at).sum().item()
        found.exp_().scatter_add_(-1, at, -torch.ones_like(at, dtype=exact))
        grad.copy_(found.mul_(weight))
    return total, grad_BTV


def score_continuation(logits_TV: Tensor, tokens: Sequence[int]) -> ContinuationScore:
    """Score a continuation from the logits at the positions before its tokens, (T, V)."""
    tokens_T = torch.tensor(tokens, device=logits_TV.device)
    loss = token_losses(logits_TV[None], tokens_T[None]).sum()
    return ContinuationScore(-loss.item(), bool((logits_TV.argmax(dim=-1) == tokens_T).all()))


def _in_parts(logits_BTV: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split rows of logits into parts for token losses, so that they stay in a CPU's cache.

    Each has at least one row per thread. On other devices all rows are one part.
    """
    some = max(torch.get_num_threads(), _LOGITS_AT_ONCE // logits_BTV.shape[-1])
    if logits_BTV.device.type != "cpu":
        some = logits_BTV.shape[:2].numel()
    each = (tensor.flatten(0, 1).split(some) for tensor in (logits_BTV, *others))
    return zip(*each, strict=True)
