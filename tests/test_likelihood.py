"""What logits say of tokens, against the plain computation."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from longrope.likelihood import answer_of, loss_and_slope, token_losses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [11, 60_000, 1_200_000])  # in one part, in some, row by row
def test_losses_are_those_of_a_softmax(dtype, vocabulary):
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 10, vocabulary, generator=random).mul(3).to(dtype)
    targets = torch.randint(vocabulary, (2, 10), generator=random)
    expected = -logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    losses = token_losses(logits, targets)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(losses.double(), expected, atol=2e-4, rtol=1e-5)
    answer = answer_of(logits[1], targets[1].tolist())
    assert answer.log_likelihood == pytest.approx(-expected[1].sum().item(), rel=1e-5)
    assert not answer.greedy
    assert answer_of(logits[1], logits[1].argmax(-1).tolist()).greedy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [11, 300_000])
def test_the_slope_is_autograds(dtype, vocabulary):
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 10, vocabulary, generator=random).mul(3).to(dtype)
    targets = torch.randint(vocabulary, (2, 10), generator=random)
    leaf = logits.double().requires_grad_()
    expected = F.cross_entropy(leaf.flatten(0, 1), targets.flatten(), reduction="sum")
    (expected / 7).backward()
    loss, slope = loss_and_slope(logits, targets, 1 / 7)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert slope.dtype == dtype
    assert_close(
        slope, leaf.grad.to(dtype), atol=1e-9, rtol=2e-4 if dtype != torch.bfloat16 else 1e-2
    )
