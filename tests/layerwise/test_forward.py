"""The layer-by-layer forward pass, against transformers' own."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import AttentionInterface

from attention.test_chunked import dense
from conftest import FAMILIES, ORIGINAL, micro_model
from longrope.distributed import SequenceParallelGroup
from longrope.layerwise.forward import LongForward
from longrope.rope import methods
from longrope.rope.apply import rescaled
from longrope.rope.rotary import find_rotary


def yarn(model, **changes):
    site = find_rotary(model)
    theta = float(site.parameters["rope_theta"])
    return methods.yarn(theta, 2 * len(site.inv_freq), ORIGINAL, 256).replace(**changes)


def dense_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    **_,
):
    output = dense(query, key, value, scaling, sliding_window, softcap, s_aux)
    return output.to(query.dtype).contiguous(), None


AttentionInterface.register("dense64", dense_attention)


@torch.no_grad()
def plain_losses(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits
    exact = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(
        logits[:, :-1].to(exact).flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(len(ids), -1)


def test_token_ids_outside_the_vocabulary_are_named(micro_models):
    """As from a tokenizer of another model."""
    with pytest.raises(ValueError, match=r"token id 1,536 .* 1,536"):
        LongForward(micro_models("llama")).losses(torch.tensor([[3, 1536, 4]]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 13, 32, 96, 4096])
def test_as_exact_as_the_plain_forward(ids, family, chunk):
    """At most twice the error of the plain float32 forward pass against float64."""
    model = micro_model(FAMILIES[family]())
    if family == "gemma2":
        model.config._attn_implementation = "eager"  # SDPA has no soft-cap
    with rescaled(model, yarn(model, start_tokens=4)):
        plain = plain_losses(model, ids)
        ours = LongForward(model, chunk).losses(ids)
        model.double()
        model.config._attn_implementation = "dense64"
        exact = plain_losses(model, ids)
    assert ours.shape == (2, 96)
    plain_error, our_error = (plain - exact).abs(), (ours - exact).abs()
    assert plain_error.max() < 1e-3
    assert our_error.max() <= 2 * plain_error.max()
    assert our_error.mean() <= 2 * plain_error.mean()


def test_a_config_that_asks_for_more_outputs_changes_nothing(ids):
    """Routers and hidden states are recorded where the model itself is called, and only there."""
    model = micro_model(FAMILIES["mixtral"]())
    expected = plain_losses(model, ids)
    model.config.output_router_logits = model.config.output_hidden_states = True
    torch.testing.assert_close(LongForward(model, 32).losses(ids), expected, atol=1e-4, rtol=1e-4)
    output = model(input_ids=ids, use_cache=False)
    assert len(output.router_logits) == len(output.hidden_states) - 1 == len(model.model.layers)


@settings(max_examples=25)
@given(
    chunk=st.integers(1, 120),
    tokens=st.integers(2, 97),
    family=st.sampled_from(["llama", "gemma3"]),
)
def test_any_chunk_and_length(micro_models, ids, chunk, tokens, family):
    model = micro_models(family)
    with rescaled(model, yarn(model)):
        expected = plain_losses(model, ids[:, :tokens])
        assert_close(
            LongForward(model, chunk).losses(ids[:, :tokens]), expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt_neox"])
def test_bf16_is_as_exact_as_the_plain_forward_in_bf16(ids, family):
    model = micro_model(FAMILIES[family]())
    if family == "gemma2":
        model.config._attn_implementation = "eager"
    with rescaled(model, yarn(model)):
        exact = plain_losses(model.double(), ids)
        plain = plain_losses(model.to(torch.bfloat16), ids)
        ours = LongForward(model, 13).losses(ids)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().mean() <= 2 * (plain - exact).abs().mean()


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        pytest.param("gemma3", marks=pytest.mark.slow),
        pytest.param("gpt_neox", marks=pytest.mark.slow),
        "gemma4",
    ],
)
def test_bytes_per_token_matches_the_memory_in_use(micro_models, family):
    """Counts all tensors as long as the sequence while the last layer runs."""
    import gc

    model = micro_models(family)
    tokens, held = 3001, {}
    ids = torch.zeros(1, tokens + 1, dtype=torch.long)
    forward = LongForward(model, 500)
    last = forward.layers[-1]

    def count(*_):
        held.clear()
        for thing in gc.get_objects():
            # isinstance wakes deprecated things; torch.compile keeps tensors without memory.
            if type(thing) in (torch.Tensor, torch.nn.Parameter):
                storage = thing.untyped_storage()
                if storage.nbytes() > 400 * 4 and storage.data_ptr() not in weights:
                    held[storage.data_ptr()] = storage.nbytes()

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with rescaled(model, yarn(model)):
        gc.collect()
        count()
        before = set(held)
        hook = last.register_forward_pre_hook(count)
        forward.losses(ids)
        hook.remove()
    found = sum(size for pointer, size in held.items() if pointer not in before)
    # Losses come after; one chunk comes on top.
    predicted = (forward.bytes_per_token() - 8) * tokens
    assert found == pytest.approx(predicted, rel=0.12)


def test_keys_that_later_layers_reuse_are_not_overwritten(ids):
    """Small Gemma 4 models with layers of one shape, which would share a buffer."""
    shared = FAMILIES["gemma4"]().to_diff_dict()
    shared |= {"num_kv_shared_layers": 2, "global_head_dim": 16, "attention_k_eq_v": False}
    shared |= {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 1536}
    shared |= {"num_global_key_value_heads": None}
    model = micro_model(transformers.Gemma4TextConfig(**shared))
    with rescaled(model, yarn(model)):
        found, expected = LongForward(model, 40).losses(ids), plain_losses(model, ids)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_recurrent_layers_refuse_sequence_parallel(micro_models, ids):
    forward = LongForward(micro_models("lfm2"), 40, group=SequenceParallelGroup(0, 2))
    with pytest.raises(ValueError, match=r"recurrent state.*sequence_parallel"):
        forward.losses(ids)


def test_rows_of_a_batch_are_independent(micro_models, ids):
    forward = LongForward(micro_models("llama"), 40)
    together = forward.losses(ids)
    assert_close(together[1:], forward.losses(ids[1:]), rtol=1e-5, atol=1e-5)


def test_the_factors_reach_the_losses(micro_models, ids):
    model = micro_models("llama")
    unscaled = LongForward(model).losses(ids)
    with rescaled(model, yarn(model)):
        assert (LongForward(model).losses(ids) - unscaled).abs().max() > 1e-2


def test_the_model_is_left_as_it_was(micro_models, ids):
    model = micro_models("gemma2")
    before, layers = plain_losses(model, ids), model.model.layers
    implementation = model.config._attn_implementation
    LongForward(model, 20).losses(ids)
    assert model.model.layers is layers
    assert model.config._attn_implementation == implementation
    assert torch.equal(plain_losses(model, ids), before)


def test_the_chunk_size_is_halved_when_out_of_memory(micro_models, ids, monkeypatch, caplog):
    forward = LongForward(micro_models("llama"), 64)
    expected = forward.losses(ids)
    original = type(forward.layers[0]).forward

    def short_of_memory(self, hidden_states, *args, **kwargs):
        if hidden_states.shape[1] > 16:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return original(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(type(forward.layers[0]), "forward", short_of_memory)
    assert_close(forward.losses(ids), expected, rtol=1e-4, atol=1e-4)
    assert forward.chunk_size == 16
    assert "chunk size 32" in caplog.text
    assert "chunk size 16" in caplog.text


def test_keys_and_values_are_allocated_once(micro_models, ids, monkeypatch):
    allocated = []
    from longrope.layerwise.stand_ins import LayerCache

    update = LayerCache.update

    def counted(self, key, value, *args, **kwargs):
        result = update(self, key, value, *args, **kwargs)
        allocated.append(tuple(k.data_ptr() for k, _ in self._buffers.values()))
        return result

    monkeypatch.setattr(LayerCache, "update", counted)
    LongForward(micro_models("llama"), 10).losses(ids)
    assert len(allocated) == 4 * 10
    assert len(set(allocated)) == 1


def test_refusals(micro_models):
    with pytest.raises(ValueError, match="chunk_size is 0"):
        LongForward(micro_models("llama"), 0)
    with pytest.raises(ValueError, match=r"Linear .*decoder layers"):
        LongForward(torch.nn.Linear(2, 2))


def test_losses_are_nats(micro_models, ids):
    model = micro_models("llama")
    with torch.no_grad():
        probabilities = model(input_ids=ids[:1], use_cache=False).logits[0, 0].softmax(-1)
    expected = -math.log(probabilities[ids[0, 1]].item())
    assert LongForward(model).losses(ids)[0, 0].item() == pytest.approx(expected, rel=1e-4)
