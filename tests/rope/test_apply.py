import copy
import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from conftest import FAMILIES, ORIGINAL, ROTARY_DIM, THETA, micro_model
from longrope.rope import methods
from longrope.rope.apply import RescaledRotary, position_override, rescaled
from longrope.rope.rescale import Rescale
from longrope.rope.rotary import find_rotary


def a_rescale(model, target=256, **changes) -> Rescale:
    site = find_rotary(model)
    theta = float(site.parameters["rope_theta"])
    rescale = methods.yarn(theta, 2 * len(site.inv_freq), ORIGINAL, target)
    return rescale.replace(**changes)


def live(model):
    """The rotary module that the model calls now."""
    site = find_rotary(model)
    return getattr(site.owner, site.name)


@torch.no_grad()
def logits(model, ids, **more):
    return model(input_ids=ids, use_cache=False, **more).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_changes_the_logits_and_leaves_no_trace(micro_models, ids, family):
    model = micro_models(family)
    before = logits(model, ids)
    with rescaled(model, a_rescale(model)):
        during = logits(model, ids)
    assert (during - before).abs().max() > 1e-2
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_restores_after_an_error(micro_models, ids, family):
    model = micro_models(family)
    before = logits(model, ids)
    with pytest.raises(KeyError), rescaled(model, a_rescale(model)):
        raise KeyError
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_inv_freq_is_the_float64_formula(micro_models, family):
    model = micro_models(family)
    theta, d = THETA.get(family, 1e4), ROTARY_DIM.get(family, 16)
    rescale = a_rescale(model)
    rotated = 4 if family == "gemma4" else d // 2
    expected = [theta ** (-2 * i / d) / rescale.factors[i] for i in range(rotated)]
    expected += [0.0] * (d // 2 - rotated)
    with rescaled(model, rescale):
        rotary = live(model)
        assert isinstance(rotary, RescaledRotary)
        assert rotary.inv_freq.dtype == torch.float32
        np.testing.assert_allclose(rotary.inv_freq.numpy(), expected, rtol=1e-7)


# Gemma 4: an export completes its factors.
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma4"])
def test_equals_transformers_own_longrope(micro_models, ids, family):
    """A rescaled model equals transformers with the exported config."""
    model = micro_models(family)
    rescale = a_rescale(model, attention_factor=1.1)
    config = copy.deepcopy(model.config)
    entry = {
        "rope_type": "longrope",
        "rope_theta": rescale.rope_theta,
        "long_factor": list(rescale.factors),
        "short_factor": list(rescale.factors),
        "attention_factor": rescale.attention_factor,
        "factor": rescale.scale,
        "original_max_position_embeddings": ORIGINAL,
    }
    site = find_rotary(model)
    if "partial_rotary_factor" in site.parameters:
        entry["partial_rotary_factor"] = site.parameters["partial_rotary_factor"]
    if site.layer_type is None:
        config.rope_parameters = entry
    else:
        config.rope_parameters[site.layer_type] = entry
    if getattr(config, "head_dim", 0) is None:  # which an export writes, for longrope's sake
        config.head_dim = 16
    config.max_position_embeddings = 256
    config.original_max_position_embeddings = ORIGINAL
    exported = type(model)(config).eval()
    exported.load_state_dict(model.state_dict())
    with rescaled(model, rescale):
        assert_close(logits(model, ids), logits(exported, ids), rtol=1e-4, atol=1e-4)


def test_axes_of_an_image_are_refused(micro_models):
    """Multimodal models have position ids per axis, which are equal for text."""
    model = micro_models("qwen3_5")
    with rescaled(model, a_rescale(model)):
        rotary, x = live(model), torch.zeros(1, 5, 1)
        row = torch.arange(5)[None]
        text = rotary(x, row[None].expand(3, -1, -1))
        torch.testing.assert_close(text, rotary(x, row))
        torch.testing.assert_close(text, rotary(x, torch.stack([row] * 3)))
        with pytest.raises(ValueError, match="text only"):
            rotary(x, torch.stack([row, row, row + 1]))


def test_the_text_rotary_of_a_multimodal_model_is_found():
    """Gemma 4's vision tower has its own rotary module, and comes first."""
    picture = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    picture |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    text = FAMILIES["gemma4"]().to_dict()
    config = transformers.Gemma4Config(text_config=text, vision_config=picture, audio_config=None)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    kinds = [type(module).__name__ for module in model.modules()]
    assert "Gemma4VisionRotaryEmbedding" in kinds
    assert type(find_rotary(model).module).__name__ == "Gemma4TextRotaryEmbedding"


def test_only_full_attention_of_gemma3_is_scaled(micro_models):
    model = micro_models("gemma3")
    rotary = find_rotary(model).module
    x, positions = torch.zeros(1, 1, 1), torch.arange(40)[None]
    with rescaled(model, a_rescale(model)):
        ours = live(model)
        assert torch.equal(
            ours(x, positions, "sliding_attention")[0], rotary(x, positions, "sliding_attention")[0]
        )
        assert not torch.equal(
            ours(x, positions, "full_attention")[0], rotary(x, positions, "full_attention")[0]
        )


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_identity_changes_nothing(micro_models, ids, family):
    model = micro_models(family)
    site = find_rotary(model)
    identity = methods.identity(
        float(site.parameters["rope_theta"]), 2 * len(site.inv_freq), ORIGINAL, 256
    )
    before = logits(model, ids)
    with rescaled(model, identity):
        assert torch.equal(logits(model, ids), before)
    with rescaled(model, None):
        assert torch.equal(logits(model, ids), before)


def test_a_rescale_inside_another(micro_models, ids):
    model = micro_models("llama")
    before = logits(model, ids)
    outer, inner = a_rescale(model), a_rescale(model, target=512)
    identity = methods.identity(1e4, 16, ORIGINAL, 256)
    with rescaled(model, inner):
        alone = logits(model, ids)
    with rescaled(model, outer):
        around = logits(model, ids)
        with rescaled(model, inner):
            assert torch.equal(logits(model, ids), alone)
        assert torch.equal(logits(model, ids), around)
        with rescaled(model, identity):  # here the identity does change something
            assert_close(logits(model, ids), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, ids), before)


def rotary_angles(model, rescale, positions):
    with rescaled(model, rescale):
        cos, sin = live(model)(torch.zeros(1, 1, 1, dtype=torch.float64), positions)
    return cos, sin


@given(
    start_tokens=st.sampled_from([0, 1, 4, 28, 256]),
    positions=st.lists(st.integers(0, 2**21), min_size=1, max_size=8),
)
def test_angles_are_equation_3(micro_models, start_tokens, positions):
    model = micro_models("llama")
    rescale = a_rescale(model, start_tokens=start_tokens, attention_factor=1.2)
    original = find_rotary(model).inv_freq.numpy()
    cos, sin = rotary_angles(model, rescale, torch.tensor([positions]))
    for row, n in enumerate(positions):
        first = n < start_tokens
        for column in range(cos.shape[-1]):
            i = column % len(rescale.factors)
            # Frequencies are float32, as in every engine; the phase is exact for them.
            frequency = float(original[i] if first else np.float32(rescale.inv_freq[i]))
            assert frequency * (1 if first else rescale.factors[i]) == pytest.approx(
                10000 ** (-2 * i / 16), rel=2e-7
            )
            scaling = 1.0 if first else 1.2
            assert cos[0, row, column] == pytest.approx(scaling * math.cos(n * frequency), abs=1e-7)
            assert sin[0, row, column] == pytest.approx(scaling * math.sin(n * frequency), abs=1e-7)


def test_phases_are_exact_where_float32_phases_are_not(micro_models):
    positions = torch.arange(2**21 - 4096, 2**21)[None]
    model = micro_models("llama")
    rescale = methods.pi(1e4, 16, ORIGINAL, 83)
    cos, sin = rotary_angles(model, rescale, positions)
    inv_freq = torch.from_numpy(rescale.inv_freq).float()
    exact = positions[0, :, None].double() * inv_freq.double()
    plain = (positions[0, :, None].float() * inv_freq).double()
    half = len(inv_freq)
    ours = torch.atan2(sin[0, :, :half], cos[0, :, :half])
    ours_off = torch.remainder(ours - exact + math.pi, 2 * math.pi) - math.pi
    assert (plain - exact).abs().max() > 0.03
    assert ours_off.abs().max() < 1e-8


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "gemma3", "gemma3_whole"])
@pytest.mark.parametrize("start_tokens", [0, 8])
def test_left_padding_does_not_matter(micro_models, ids, family, start_tokens):
    model = micro_models(family)
    decoder = find_rotary(model).owner
    pad = 7
    short = ids[:1, : 97 - pad]
    batch = torch.stack([ids[0], torch.cat([torch.full((pad,), 2), short[0]])])
    mask = torch.ones_like(batch)
    mask[1, :pad] = 0
    with rescaled(model, a_rescale(model, start_tokens=start_tokens)):
        alone = logits(model, short)
        whole = logits(model, ids[:1])
        padded = logits(model, batch, attention_mask=mask)
        inner = decoder(batch, mask, use_cache=False).last_hidden_state
        inner_alone = decoder(short, use_cache=False).last_hidden_state
    assert_close(padded[1:, pad:], alone, rtol=1e-4, atol=1e-4)
    assert_close(padded[:1], whole, rtol=1e-4, atol=1e-4)
    assert_close(inner[1:, pad:], inner_alone, rtol=1e-4, atol=1e-4)


def test_position_ids_of_the_caller_are_used(micro_models, ids):
    model = micro_models("llama")
    with rescaled(model, a_rescale(model, start_tokens=8)):
        positions = torch.arange(97)[None].expand(2, -1)
        given = logits(model, ids, position_ids=positions)
        assert_close(given, logits(model, ids))
        shifted = logits(model, ids, position_ids=positions + 3)
        mask = torch.ones_like(ids)
        with_mask = logits(model, ids, position_ids=positions + 3, attention_mask=mask)
    assert (shifted - given).abs().max() > 1e-2  # n̂ sees other tokens
    assert_close(with_mask, shifted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_position_override_equals_given_position_ids(micro_models, ids, family):
    """Position ids are passed with a mask, so that a jump does not start a new sequence."""
    model = micro_models(family)
    places = torch.arange(ids.shape[1])[None].repeat(2, 1)
    places[0, 30:] += 100
    places[1, 50:] += 7
    with rescaled(model, a_rescale(model)):
        plain = logits(model, ids)
        with position_override(model, places):
            found = logits(model, ids)
        assert torch.equal(logits(model, ids), plain)
        expected = logits(model, ids, position_ids=places, attention_mask=torch.ones_like(ids))
    assert (found - plain).abs().max() > 1e-3
    if find_rotary(model).layer_type is None:  # a sliding window sees no jump
        assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_equals_uncached(micro_models, ids, family):
    model = micro_models(family)
    prompt = ids[:, :40]
    with rescaled(model, a_rescale(model, start_tokens=4)):
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        mask = torch.ones_like(prompt)
        cached = model.generate(prompt, attention_mask=mask, use_cache=True, **options)
        tokens = prompt
        for _ in range(12):
            tokens = torch.cat([tokens, logits(model, tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, tokens)


def test_bf16_keeps_float32_frequencies(ids):
    model = micro_model(FAMILIES["llama"]())
    rescale = a_rescale(model)
    with rescaled(model, rescale):
        exact = logits(model, ids)
        model.to(torch.bfloat16)
        rotary = live(model)
        assert rotary.inv_freq.dtype == torch.float32
        cos, _ = rotary(torch.zeros(1, 1, 1, dtype=torch.bfloat16), torch.tensor([[9999]]))
        assert cos.dtype == torch.bfloat16
        rounded = logits(model, ids).float()
    assert (rounded - exact).std() / exact.std() < 0.05


def test_gradient_checkpointing_gives_the_same_gradients(ids):
    gradients = []
    for checkpointing in (False, True):
        model = micro_model(FAMILIES["llama"]()).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with rescaled(model, a_rescale(model, start_tokens=4)):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().max() > 0


def test_wrong_fields_are_refused_by_name(micro_models):
    model = micro_models("llama")
    with (
        pytest.raises(ValueError, match=r"factors has 3 .* 8 "),
        rescaled(model, Rescale((1.0, 2.0, 3.0), 1e4, 64, 128)),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"rope_theta is 500; .* 10000"),
        rescaled(model, a_rescale(model, rope_theta=500.0)),
    ):
        pass


def test_no_rope_is_refused(ids):
    import transformers

    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100, n_positions=64)
    model = transformers.GPT2LMHeadModel(config)
    rescale = methods.pi(1e4, 16, 64, 128)
    with pytest.raises(ValueError, match="no rotary"), rescaled(model, rescale):
        pass


class Wrapper(torch.nn.Module):
    """A wrapper that hides the names of arguments, as torch.compile's, DDP and PEFT's do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_a_wrapped_model_computes_positions_from_the_mask(micro_models, ids):
    model, row = micro_models("gemma3_whole"), ids[:1, :30]
    padded = torch.cat([torch.full((1, 5), 2), row], dim=1)
    mask = (torch.arange(35) >= 5).long()[None]
    with torch.no_grad(), rescaled(Wrapper(model), a_rescale(model)):
        expected = model(row, use_cache=False).logits
        found = Wrapper(model)(padded, attention_mask=mask, use_cache=False).logits[:, 5:]
    assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not model._forward_pre_hooks
