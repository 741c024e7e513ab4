"""Factors out of checkpoints that others scaled."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import pair
from longrope.checkpoints.export import ExportOptions, export
from longrope.checkpoints.importer import import_pair
from longrope.rope.apply import rescaled

SCALINGS = {
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
}


@pytest.fixture
def scaled(checkpoints, tmp_path):
    def make(kind):
        for file in checkpoints("llama").iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text())
        if "original_max_position_embeddings" in SCALINGS[kind]:
            config["max_position_embeddings"] = 512
        config["rope_parameters"] = {"rope_theta": 1e4, "rope_type": kind} | SCALINGS[kind]
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return make


@pytest.mark.parametrize("kind", SCALINGS)
def test_the_factors_compute_what_transformers_does(kind, scaled, micro_models):
    directory = scaled(kind)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    imported = import_pair(str(directory))
    rescale = imported.long
    assert imported.short == rescale
    assert rescale.original_max_position_embeddings == 64
    longest = rescale.max_position_embeddings
    # What linear scaling was for no config says: it is taken as the length stands there.
    assert longest == {"linear": 64, "dynamic": 256}.get(kind, 512)
    # dynamic scaling is what it is at the longest sequence, and only there
    ids = torch.randint(3, 1500, (1, longest), generator=torch.Generator().manual_seed(0))
    ours = micro_models("llama")
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        with rescaled(ours, rescale):
            torch.testing.assert_close(ours(input_ids=ids).logits, expected, atol=2e-3, rtol=1e-3)
        assert (ours(input_ids=ids).logits - expected).abs().max() > 0.1


def test_dynamic_scaling_starts_from_the_length_in_the_config(scaled):
    """As in transformers, which does not read an original length there."""
    directory = scaled("dynamic")
    config = json.loads((directory / "config.json").read_text())
    config["max_position_embeddings"] = 128
    config["rope_parameters"]["original_max_position_embeddings"] = 64
    (directory / "config.json").write_text(json.dumps(config))
    imported = import_pair(str(directory)).long
    assert imported.max_position_embeddings == 512
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).model.rotary_emb
    theirs(torch.zeros(1), torch.arange(512)[None])  # which computes the frequencies at 512
    torch.testing.assert_close(
        torch.tensor(imported.inv_freq).float(), theirs.inv_freq.float(), rtol=1e-5, atol=0
    )


def test_csv_to_checkpoint_and_back(checkpoints, micro_models, tmp_path):
    factors = [1.0, 1.1, 1.7, math.e, 3.3, 5.9, 7.25, 8.0]
    (tmp_path / "8x.csv").write_text(",".join(map(repr, factors)))
    out = tmp_path / "out"
    export(
        ExportOptions(
            str(checkpoints("llama")), out, long_factors=str(tmp_path / "8x.csv"), target="8x"
        )
    )
    imported = import_pair(str(out))
    assert imported.long.factors == tuple(factors)
    assert imported.long.max_position_embeddings == 512


def test_a_checkpoint_changed_by_another_hand_is_believed_over_our_note(
    checkpoints, micro_models, tmp_path
):
    made = pair(micro_models("llama"))
    made.long.save(tmp_path / "long.json")
    out = tmp_path / "out"
    export(ExportOptions(str(checkpoints("llama")), out, long_factors=str(tmp_path / "long.json")))
    assert import_pair(str(out)).long == made.long
    config = json.loads((out / "config.json").read_text())
    for block in ("rope_parameters", "rope_scaling"):
        config[block]["long_factor"][3] = 4.75
    (out / "config.json").write_text(json.dumps(config))
    assert import_pair(str(out)).long.factors[3] == 4.75


def test_an_unscaled_model_has_nothing_to_import(checkpoints):
    with pytest.raises(ValueError, match="not scaled"):
        import_pair(str(checkpoints("llama")))
    with pytest.raises(ValueError, match=r"nowhere\.gguf: no such"):
        import_pair("nowhere.gguf")
    with pytest.raises(ValueError, match="/no/where: no such"):
        import_pair("/no/where")


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_longrope_checkpoints_of_others_are_read(family, micro_models, tmp_path):
    """A config with nothing of ours beside it, as Phi-3's."""
    made, model = pair(micro_models(family)), micro_models(family)
    config = model.config.to_dict() | {"max_position_embeddings": 512}
    config["original_max_position_embeddings"] = 80  # where Phi-3 has it
    config["rope_parameters"] = config["rope_parameters"] | {
        "rope_type": "longrope",
        "short_factor": list(made.short.factors),
        "long_factor": list(made.long.factors),
        "original_max_position_embeddings": 80,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = import_pair(str(tmp_path))
    assert (found.short.factors, found.long.factors) == (made.short.factors, made.long.factors)
    assert found.recovery_length == 80
    expected = math.sqrt(1 + math.log(512 / 80) / math.log(80))
    np.testing.assert_allclose(found.long.attention_factor, expected)
