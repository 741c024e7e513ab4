"""Models that are scaled already: kept, replaced, or refused until that is said."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from conftest import ORIGINAL
from longrope.checkpoints.importer import import_pair
from longrope.layerwise.forward import LongForward
from longrope.models.info import inspect_model
from longrope.models.load import load_model
from longrope.rope.apply import rescaled

SCALED = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0, 1.1, 1.5, 2.0, 3.0, 4.0, 4.0, 4.0],
        "original_max_position_embeddings": 16,
    },
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


@pytest.fixture
def scaled(checkpoints, tmp_path):
    """A micro-Llama's directory with scaling written into its config."""

    def make(kind: str):
        shutil.copytree(checkpoints("llama"), tmp_path / kind)
        path = tmp_path / kind / "config.json"
        config = json.loads(path.read_text())
        config["rope_parameters"] = {"rope_theta": 1e4} | SCALED[kind]
        path.write_text(json.dumps(config))
        return str(tmp_path / kind)

    return make


@pytest.mark.parametrize("kind", SCALED)
def test_scaling_must_be_kept_or_replaced(scaled, kind):
    source = scaled(kind)
    info = inspect_model(source)
    assert not info.extendable
    assert ("rope_scaling='keep'" in info.reason) == (kind != "dynamic")
    assert "rope_scaling='replace'" in info.reason
    assert info.rope_scaling["rope_type"] == kind
    with pytest.raises(ValueError, match="rope_scaling="):
        load_model(source)


@pytest.mark.parametrize("kind", SCALED)
def test_replaced_scaling_starts_over(scaled, micro_models, ids, kind):
    """The model is the unscaled one, also below n̂, and in chunks."""
    told = 16 if kind == "linear" else None
    loaded = load_model(scaled(kind), rope_scaling="replace", original_length=told)
    info = loaded.info
    assert info.original_max_position_embeddings == (ORIGINAL if kind == "dynamic" else 16)
    if kind in ("yarn", "llama3", "longrope"):
        assert info.original_read_from == "rope_parameters.original_max_position_embeddings"
    assert info.rope_scaling["rope_type"] == kind
    none = info.rescale("none", 128)
    assert set(none.factors) == {1.0}
    assert none.attention_factor == 1
    unscaled = micro_models("llama")
    with torch.no_grad():
        for rescale in (none, info.rescale("yarn", 128).replace(start_tokens=8)):
            with rescaled(loaded.model, rescale), rescaled(unscaled, rescale):
                ours = loaded.model(input_ids=ids, use_cache=False).logits
                expected = unscaled(input_ids=ids, use_cache=False).logits
                chunked = LongForward(loaded.model, 20).losses(ids)
                whole = LongForward(unscaled).losses(ids)
            torch.testing.assert_close(ours, expected)
            torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)


def test_linear_scaling_does_not_say_what_it_was(scaled):
    info = inspect_model(scaled("linear"), rope_scaling="replace")
    assert not info.extendable
    assert "give `original_length`" in info.reason


@pytest.mark.parametrize("kind", ["yarn", "llama3", "longrope", "linear"])
def test_kept_scaling_is_the_start(scaled, kind, ids):
    """With the scaling kept, 'none' computes what the model does, beyond its original length."""
    loaded = load_model(scaled(kind), rope_scaling="keep")
    info = loaded.info
    assert info.original_max_position_embeddings == ORIGINAL
    base = info.rescale("none", 4 * ORIGINAL)
    with torch.no_grad():
        own = loaded.model(input_ids=ids, use_cache=False).logits
        unscaled = base.replace(factors=(1.0,) * 8, attention_factor=1.0)
        with rescaled(loaded.model, base):
            kept = loaded.model(input_ids=ids, use_cache=False).logits
        with rescaled(loaded.model, unscaled):
            plain = loaded.model(input_ids=ids, use_cache=False).logits
        with rescaled(loaded.model, base):  # one factor set, whatever the chunk
            chunked = LongForward(loaded.model, 7).losses(ids)
            whole = LongForward(loaded.model).losses(ids)
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kept, own, rtol=1e-4, atol=1e-4)
    assert (plain - own).abs().max() > 1e-2
    doubled = info.rescale("pi", 2 * ORIGINAL)
    assert doubled.factors == pytest.approx([2 * f for f in base.factors])


@pytest.mark.parametrize(
    ("kind", "factor", "length"),
    [
        ("yarn", 8.0, 128),
        ("yarn", 2.0, ORIGINAL),
        ("llama3", 2.0, ORIGINAL),  # Llama 3.1
        ("llama3", 32.0, ORIGINAL),  # Llama 3.2: its factor is no ratio of lengths
    ],
)
def test_the_scaled_length_is_what_the_config_says_or_its_factor(scaled, kind, factor, length):
    """Some configs leave max_position_embeddings as it was, others raise it."""
    source = scaled(kind)
    path = Path(source) / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["factor"] = factor
    path.write_text(json.dumps(config))
    info = inspect_model(source, rope_scaling="keep")
    assert info.original_max_position_embeddings == length
    assert f"scaled length, {length:,}," in inspect_model(source).reason
    assert import_pair(source).long.max_position_embeddings == length


def test_what_to_do_with_scaling_is_one_of_two(scaled):
    with pytest.raises(ValueError, match=r"rope_scaling is 'Keep'; .*keep .*replace"):
        load_model(scaled("yarn"), rope_scaling="Keep")


def test_a_length_that_transformers_filled_in_is_called_so(scaled):
    source = scaled("yarn")
    path = Path(source) / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"], config["max_position_embeddings"]
    path.write_text(json.dumps(config))
    info = inspect_model(source)
    assert info.original_max_position_embeddings == 2048
    assert info.original_read_from == "the default of LlamaConfig (not in its config.json)"


def test_dynamic_scaling_cannot_be_kept(scaled):
    with pytest.raises(ValueError, match=r"dynamic .*rope_scaling='replace'"):
        load_model(scaled("dynamic"), rope_scaling="keep")
