import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import conftest
from longrope.attention import autograd
from longrope.rope.apply import position_override, rescaled
from longrope.rope.methods import identity, yarn
from longrope.train.loss import chunked_loss

FAMILIES = ["llama", "gemma2", "granite", "cohere", "phi3", "gpt_neox"]  # soft-caps and scalings
FAMILIES += ["mixtral", "qwen3_5"]
# transformers materialises all scores for these, or a sliding-window mask.
OURS = ["gemma2", "gpt_oss", "gemma3", "gemma4", "mistral", "qwen2"]
FAMILIES += OURS[1:]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [7, 1024])
def test_loss_and_gradients_equal_those_of_full_logits(micro_models, ids, family, rows):
    model = micro_models(family)
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1))
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    expected = (losses * weights[:, 1:].flatten()).mean()
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with chunked_loss(model, rows=rows):
        assert (model.config._attn_implementation == autograd.TRAINED) is (family in OURS)
        found = model(input_ids=ids, weights=weights)["loss"]
        found.backward()
    torch.testing.assert_close(found, expected)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-3)
    model.zero_grad()
    assert model(input_ids=ids, use_cache=False).logits.shape == (2, 97, 1536)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2", "gemma3"])
def test_our_attention_trains_models_without_a_fused_one(ids, family):
    """Equals eager attention, under checkpointing and autocast as in the Trainer."""
    model = conftest.micro_model(conftest.FAMILIES[family]())
    its_own = model.config._attn_implementation
    model.train().activation_checkpointing_enable({"use_reentrant": False})

    def all_scores(rough):
        with rough:
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()

    def ours(rough):
        with chunked_loss(model):
            assert model.config._attn_implementation == autograd.TRAINED
            with rough:
                loss = model(input_ids=ids)["loss"]
            loss.backward()

    def gradients(trained, rough):
        trained(torch.autocast("cpu", torch.bfloat16, enabled=rough))
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    exact, found = gradients(all_scores, False), gradients(ours, False)
    assert any("sinks" in name for name in exact) == (family == "gpt_oss")
    for name, gradient in exact.items():
        assert_close(found[name], gradient, atol=1e-4, rtol=1e-3)
    true, theirs, own = (
        torch.cat([gradient.flatten() for gradient in each.values()])
        for each in (exact, gradients(all_scores, True), gradients(ours, True))
    )
    assert 0 < (own - true).norm() <= 1.5 * (theirs - true).norm()
    assert model.config._attn_implementation == its_own


def test_the_logits_of_the_whole_sequence_are_never_made(micro_models, ids):
    """At most ``rows`` rows of logits at a time, over the batch or all short windows."""
    model, rows = micro_models("llama"), []
    hook = model.lm_head.register_forward_hook(
        lambda m, a, out: rows.append(out.shape[0] * out.shape[1])
    )
    with chunked_loss(model, identity(10_000.0, 16, 64, 64), rows=10):
        model(input_ids=ids)["loss"].backward()
        assert max(rows) == 10
        assert len(rows) == 2 * 20  # in the forward pass, and recomputed in the backward pass
        model(input_ids=ids[:1], short_ids=ids[:, :80].reshape(1, 5, 32))["loss"].backward()
    hook.remove()
    model.zero_grad()
    assert max(rows) == 10


def test_short_windows_count_under_a_rescale_of_their_own(micro_models, ids):
    model = micro_models("llama")
    long = yarn(10_000.0, 16, 64, 256)
    short = identity(10_000.0, 16, 64, 64).replace(attention_factor=1.2)
    windows = ids[:, :60].reshape(2, 3, 20)
    with rescaled(model, long):
        one = losses(model, ids)
    with rescaled(model, short):
        other = losses(model, windows.flatten(0, 1))
    with rescaled(model, long), chunked_loss(model, short):
        found = model(input_ids=ids, short_ids=windows)["loss"]
        without = model(input_ids=ids)["loss"]
    torch.testing.assert_close(found, torch.cat([one, other]).mean())
    torch.testing.assert_close(without, one.mean())


def test_rotary_positions_apply_to_the_long_sequence_only(micro_models, ids):
    model = micro_models("llama")
    long, short = yarn(10_000.0, 16, 64, 256), identity(10_000.0, 16, 64, 64)
    windows, rotary_positions = (
        ids[:, :60].reshape(2, 3, 20),
        torch.arange(ids.shape[1]).repeat(2, 1),
    )
    rotary_positions[:, 40:] += 150
    with rescaled(model, long), position_override(model, rotary_positions):
        one = losses(model, ids)
    with rescaled(model, short):
        other = losses(model, windows.flatten(0, 1))
    with rescaled(model, long), chunked_loss(model, short):
        found = model(input_ids=ids, short_ids=windows, rotary_positions=rotary_positions)["loss"]
        plain = model(input_ids=ids, short_ids=windows)["loss"]
    torch.testing.assert_close(found, torch.cat([one, other]).mean())
    assert abs(found - plain) > 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_short_windows_learn_the_predictions_of_a_teacher(micro_models, ids, family):
    """Equals the cross-entropy of both models' full logits."""
    model = micro_models(family)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    rotary_dim = 32 if family == "gemma2" else 16
    short = identity(10_000.0, rotary_dim, 64, 64).replace(attention_factor=1.2)
    windows = ids[:, :60].reshape(2, 3, 20)
    flat = windows.flatten(0, 1)
    with torch.no_grad():
        wanted = teacher(input_ids=flat, use_cache=False).logits[:, :-1].float().softmax(-1)
    with rescaled(model, short):
        logits = model(input_ids=flat, use_cache=False).logits[:, :-1].float()
    taught = -(wanted * logits.log_softmax(-1)).sum(-1).flatten()
    expected = torch.cat([losses(model, ids), taught]).mean()
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with chunked_loss(model, short, teacher=teacher, rows=7):
        found = model(input_ids=ids, short_ids=windows)["loss"]
        found.backward()
    torch.testing.assert_close(found, expected)
    for name, gradient in gradients.items():
        found = model.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, atol=1e-4, rtol=1e-3)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    model.zero_grad()


def losses(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
