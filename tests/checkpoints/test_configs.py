"""A config is read as transformers reads it: ours against the rotary module that it builds."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longrope.checkpoints.importer import import_pair
from longrope.models.info import inspect_model
from longrope.progress import quiet
from longrope.rope.rotary import find_rotary

_HALF = 8
_SHAPE = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2 * _HALF,
    "pad_token_id": 0,
}
_WITH_LENGTH = ("yarn", "llama3", "longrope")


@st.composite
def configs(draw) -> dict:
    """The ``config.json`` of a scaled model, in the spellings of several years."""
    kind = draw(st.sampled_from(("default", "linear", "dynamic", *_WITH_LENGTH)))
    longest = draw(st.sampled_from((128, 512, 2048)))
    scaling: dict = {draw(st.sampled_from(("type", "rope_type"))): kind}
    if kind in ("linear", "dynamic", "yarn", "llama3"):
        scaling["factor"] = draw(st.sampled_from((1, 2.0, 4.0, 8)))
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "yarn" and draw(st.booleans()):
        scaling |= {"beta_fast": draw(st.sampled_from((16, 32))), "truncate": draw(st.booleans())}
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            factor = st.floats(1, 64, allow_nan=False)
            scaling[name] = draw(st.lists(factor, min_size=_HALF, max_size=_HALF))
        if draw(st.booleans()):
            scaling["factor"] = draw(st.sampled_from((2.0, 8.0)))
    if kind in ("yarn", "longrope") and draw(st.booleans()):
        scaling["attention_factor"] = draw(st.sampled_from((0.8, 1.0, 1.3)))
    model_type = draw(st.sampled_from(("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2")))
    if model_type == "phi3" and kind == "longrope" and draw(st.booleans()):
        scaling = {key: "su" if value == kind else value for key, value in scaling.items()}
    config = _SHAPE | {"model_type": model_type, "max_position_embeddings": longest}
    original = st.sampled_from((32, 64, 100, longest))
    if kind in _WITH_LENGTH and draw(st.booleans()):
        scaling["original_max_position_embeddings"] = draw(original)
    if draw(st.booleans()):
        config["original_max_position_embeddings"] = draw(original)
    theta = draw(st.sampled_from((1e4, 5e5, 1000000)))
    if draw(st.booleans()):
        return config | {"rope_parameters": scaling | {"rope_theta": theta}}
    config |= {"rope_theta": theta} if draw(st.booleans()) else {}
    return config | ({"rope_scaling": scaling} if kind != "default" else {})


def built(directory: Path):
    """The rotary module of the model that transformers builds, with real frequencies."""
    with quiet():
        config = transformers.AutoConfig.from_pretrained(directory)
        return find_rotary(transformers.AutoModelForCausalLM.from_config(config))


def at(rotary, length: int) -> tuple[np.ndarray, float]:
    """Frequencies and attention factor that it applies to a sequence of that length."""
    cos, sin = rotary(torch.zeros(1, 1, 1), torch.tensor([[0, length - 1]]))
    radius = float((cos[0, 0, 0] ** 2 + sin[0, 0, 0] ** 2).sqrt())
    return rotary.inv_freq.double().numpy(), radius


def agree(rescale, rotary, length: int) -> None:
    frequencies, factor = at(rotary, length)
    np.testing.assert_allclose(rescale.inv_freq, frequencies, rtol=2e-5)
    assert rescale.attention_factor == pytest.approx(factor, rel=1e-5)


def check(config: dict, directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(config))
    try:
        site = built(directory)
    except Exception:  # a few that the class refuses: Phi-3 with other kinds than longrope
        for read in (inspect_model, import_pair):
            with pytest.raises(ValueError, match=str(directory)):
                read(str(directory))
        return
    rotary, kind = site.module, site.rope_type
    info = inspect_model(str(directory), rope_scaling=None if kind == "dynamic" else "keep")
    longest = config["max_position_embeddings"]
    original = site.parameters.get("original_max_position_embeddings", longest)
    if kind == "default":
        assert info.original_max_position_embeddings == longest
        agree(info.rescale("none", longest), rotary, longest)
        with pytest.raises(ValueError, match="not scaled"):
            import_pair(str(directory))
        return
    if kind not in ("dynamic", "linear"):
        replaced = inspect_model(str(directory), rope_scaling="replace")
        assert replaced.original_max_position_embeddings == original
    if kind != "dynamic":
        assert info.base_attention_factor == pytest.approx(at(rotary, 4096)[1], rel=1e-5)
    found = import_pair(str(directory))
    if kind == "longrope":
        # The boundary as its forward pass has it, not as a field says it.
        agree(found.short, rotary, found.recovery_length)
        agree(found.long, rotary, found.recovery_length + 1)
        assert found.recovery_length == original
    else:
        agree(found.long, rotary, found.long.max_position_embeddings)


@pytest.mark.slow
@settings(max_examples=500, suppress_health_check=list(HealthCheck))
@given(configs())
def test_generated_configs_are_read_as_transformers_reads_them(config):
    with tempfile.TemporaryDirectory() as directory:
        check(config, Path(directory))


_FACTORS = {"short_factor": [1.0] * _HALF, "long_factor": [2.0] * _HALF}


@pytest.mark.parametrize("block", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["longrope", "yarn"])
def test_the_length_at_the_top_level_counts(kind, block, tmp_path):
    """Of a Llama config, where its class has no such field; 512 and 1.0 would be wrong."""
    scaling = {"rope_type": kind, "rope_theta": 1e4}
    scaling |= _FACTORS if kind == "longrope" else {"factor": 8.0}
    config = _SHAPE | {"model_type": "llama", "max_position_embeddings": 512}
    check(config | {"original_max_position_embeddings": 64, block: scaling}, tmp_path)
    found = import_pair(str(tmp_path))
    if kind == "longrope":
        assert found.recovery_length == 64
        assert found.long.attention_factor == pytest.approx(1.2247449)
    else:
        assert found.long.original_max_position_embeddings == 64
