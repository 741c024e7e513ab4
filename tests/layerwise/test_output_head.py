"""Token losses and scores, against the plain computation."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from longrope.layerwise.output_head import loss_and_grad, score_continuation, token_losses

DTYPES = [torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(params=[1000, 40, 1], ids=["whole", "in parts", "row by row"])
def made(request, monkeypatch):
    """Logits over eleven tokens at twenty positions, and targets, in parts of a given size."""
    monkeypatch.setattr("longrope.layerwise.output_head._LOGITS_AT_ONCE", request.param)
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 2, 11, generator=random).mul(3).transpose(0, 1)
    return logits, torch.randint(11, (2, 10), generator=random)


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_are_those_of_a_softmax(made, dtype):
    logits, targets = made[0].to(dtype), made[1]
    expected = -logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    losses = token_losses(logits, targets)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(losses.double(), expected, atol=1e-6, rtol=1e-6)
    answer = score_continuation(logits[1], targets[1].tolist())
    assert answer.log_likelihood == pytest.approx(-expected[1].sum().item(), rel=1e-6)
    assert not answer.greedy
    assert score_continuation(logits[1], logits[1].argmax(-1).tolist()).greedy


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_equals_autograd(made, dtype):
    logits, targets = made[0].to(dtype), made[1]
    leaf = logits.double().detach().requires_grad_()
    expected = F.cross_entropy(leaf.flatten(0, 1), targets.flatten(), reduction="sum")
    (expected / 7).backward()
    loss, grad = loss_and_grad(logits, targets, 1 / 7)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert grad.dtype == dtype
    assert_close(grad, leaf.grad.to(dtype), atol=1e-7, rtol=1e-2 if dtype.itemsize == 2 else 1e-5)
