"""Generation token by token, over the boundary, against transformers' own."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import longrope
from conftest import pair
from longrope.checkpoints.hf import export_model
from longrope.checkpoints.manifest import Manifest
from longrope.checkpoints.run_directory import original_of
from longrope.data.encoding import encode_prompt
from longrope.execution import ExecutionConfig
from longrope.inference.generate import decode_tokens, generate_tokens
from longrope.inference.load import load_extended
from longrope.layerwise.forward import Continuation
from longrope.models.bundled import BUNDLED
from longrope.models.load import LoadedModel, load_model
from longrope.pipeline.recipe import make_recipe
from longrope.rope.switch import switched
from program import succeeds


@pytest.fixture(scope="module")
def bundled():
    return load_model("bundled")


def pair_for(info):
    from longrope.rope.pair import RescalePair

    factor = info.rescale("yarn", 2048).attention_factor
    short = info.rescale("none", 300).replace(attention_factor=factor)
    return RescalePair(short.replace(max_position_embeddings=300), info.rescale("yarn", 2048))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3", "gemma2", "cohere"])
def test_stream_equals_generate_without_a_cache(checkpoints, ids, family):
    execution = ExecutionConfig(dtype="float32", chunk_size=20)
    loaded = load_model(str(checkpoints(family)), execution)
    both, prompt = pair(loaded.model), ids[0, :75].tolist()
    loaded.model.generation_config.eos_token_id = None
    found = list(generate_tokens(loaded, both.choose, prompt, max_new_tokens=12))
    with switched(loaded.model, both):
        expected = loaded.model.generate(
            ids[:1, :75],
            attention_mask=torch.ones(1, 75, dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            use_cache=False,
            pad_token_id=2,
        )[0, 75:].tolist()
    assert found == expected


def test_an_export_generates_the_same_in_a_process_of_its_own(bundled, tmp_path):
    """The command line on an exported checkpoint, and on a run with its pair beside it."""
    made = pair_for(bundled.info)
    export_model(bundled, Manifest("hf", "bundled", made), tmp_path / "model")
    made.long.save(tmp_path / "rescale.json")
    made.short.save(tmp_path / "short.json")
    book = tmp_path / "book.txt"
    book.write_text("import os\n" * 80)
    texts = []
    for source in (tmp_path, tmp_path / "model"):
        prompt = ["--prompt-file", book, "--prompt", "import"]
        texts.append(succeeds("generate", source, *prompt, "--max-new-tokens", 9))
    loaded, loaded_pair = load_extended(str(tmp_path))
    assert loaded_pair == made
    ids = loaded.tokenizer(book.read_text() + "import")["input_ids"]
    expected = "".join(
        decode_tokens(loaded, generate_tokens(loaded, made.choose, ids, max_new_tokens=9))
    )
    assert texts == [expected + "\n"] * 2


def test_plain_transformers_reads_the_exported_pair(bundled, tmp_path):
    from longrope.rope.apply import rescaled

    made = pair_for(bundled.info)
    export_model(bundled, Manifest("hf", "bundled", made), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    own = load_model("bundled", ExecutionConfig(dtype="float32")).model
    ids = torch.randint(3, 1500, (1, 700), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        unscaled = own(input_ids=ids).logits
        for tokens, rescale in ((300, made.short), (301, made.long), (700, made.long)):
            with rescaled(own, rescale):
                expected = own(input_ids=ids[:, :tokens]).logits
            found = model(input_ids=ids[:, :tokens]).logits
            torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
            assert (found - unscaled[:, :tokens]).abs().max() > 0.1
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["original_max_position_embeddings"] == 300
    assert config["max_position_embeddings"] == 2048
    assert config["rope_scaling"]["type"] == config["rope_parameters"]["rope_type"] == "longrope"


def test_what_a_checkpoint_cannot_say_is_refused(bundled, tmp_path):
    from longrope.rope.pair import RescalePair

    made = pair_for(bundled.info)
    pair = RescalePair(made.short, made.long.replace(start_tokens=4))
    with pytest.raises(ValueError, match="start_tokens is 4"):
        export_model(bundled, Manifest("hf", "bundled", pair), tmp_path / "m")
    short = made.short.replace(attention_factor=1.0)
    with pytest.raises(ValueError, match=r"attention_factor is 1 .*1.20794"):
        export_model(
            bundled, Manifest("hf", "bundled", RescalePair(short, made.long)), tmp_path / "m"
        )
    assert not (tmp_path / "m").exists()


def test_sampling_is_decided_by_the_seed(bundled):
    def text(seed):
        ids = bundled.tokenizer("def f(")["input_ids"]
        options = {"max_new_tokens": 12, "temperature": 1.0, "seed": seed}
        return list(generate_tokens(bundled, None, ids, **options))

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_an_empty_prompt_is_refused(bundled):
    loaded = LoadedModel(bundled.model, bundled.tokenizer, bundled.info)
    with pytest.raises(ValueError, match="prompt is empty"):
        next(generate_tokens(loaded, None, [], max_new_tokens=1))


def test_a_model_that_is_scaled_already_goes_on_as_it_came(checkpoints, ids, tmp_path):
    shutil.copytree(checkpoints("llama"), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    source = str(tmp_path / "m")
    with pytest.raises(ValueError, match="choose rope_scaling='keep'"):
        load_extended(source)
    execution = ExecutionConfig(dtype="float32", chunk_size=20)
    loaded, none = load_extended(source, execution, rope_scaling="keep")
    assert none is None
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for model in (loaded.model, plain):
        model.generation_config.eos_token_id = None
    found = list(generate_tokens(loaded, None, ids[0].tolist(), max_new_tokens=8))
    told = {"attention_mask": torch.ones_like(ids[:1]), "pad_token_id": 2}
    expected = plain.generate(ids[:1], max_new_tokens=8, do_sample=False, **told)
    assert found == expected[0, ids.shape[1] :].tolist()
    kept = ["--rope-scaling", "keep"]
    succeeds("generate", source, "--prompt", "import os", *kept, "--max-new-tokens", 2)
    told = [*kept, "--original-length", 32, "--target", "2x", "--json"]
    assert json.loads(succeeds("plan", source, *told))["stages"][0]["length"] == 64


def test_an_export_is_as_long_originally_as_what_it_was_made_from(bundled, tmp_path):
    """Its config calls the recovery length so, where the long factors begin."""
    made = pair_for(bundled.info)
    export_model(bundled, Manifest("hf", "bundled", made), tmp_path / "model")
    loaded, found = load_extended(str(tmp_path / "model"))
    assert found is not None and found.recovery_length == 300
    assert loaded.info.original_max_position_embeddings == 256
    (tmp_path / "model" / "longrope.json").unlink()
    loaded, _ = load_extended(str(tmp_path / "model"))
    assert loaded.info.original_max_position_embeddings == 300


def test_the_original_of_a_run_is_loaded_as_the_run_did(tmp_path):
    """But whether its code is trusted is not for the run to say."""
    for name in ("rescale.json", "short.json", "model"):
        (tmp_path / name).touch()
    assert original_of(str(tmp_path)) is None
    recipe = make_recipe(
        {
            "model": "owner/name",
            "target": "8x",
            "rope_scaling": "keep",
            "original_length": 512,
            "execution": {"trust_remote_code": True},
        }
    )
    recipe.save(tmp_path / "recipe.yaml")
    assert original_of(str(tmp_path)) == {
        "source": "owner/name",
        "rope_scaling": "keep",
        "original_length": 512,
    }
    assert original_of("owner/name") is None


def test_tokens_outside_the_embeddings(tmp_path):
    """A ``<pad>`` beyond the table harms nobody until a text contains it."""
    shutil.copytree(BUNDLED, tmp_path / "m")
    file = tmp_path / "m" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"].append(content["added_tokens"][2] | {"id": 1536, "content": "<pad>"})
    file.write_text(json.dumps(content))
    loaded = load_model(str(tmp_path / "m"))
    plain, beyond = (encode_prompt(loaded.tokenizer, f"import os{end}") for end in ("", "<pad>"))
    assert (plain[-1] < 1536, beyond[-1]) == (True, 1536)
    assert len(list(generate_tokens(loaded, None, plain, max_new_tokens=3))) == 3
    named = r"token id 1,536 is outside the model's embeddings of 1,536 tokens"
    forward = loaded.forward()
    ids = torch.tensor([beyond])
    for path in (
        lambda: next(generate_tokens(loaded, None, beyond, max_new_tokens=3)),
        lambda: forward.losses(ids),
        lambda: forward.score(ids, []),
        lambda: forward.score(ids[:, :-1], [Continuation(0, 1, beyond[1:])]),
        lambda: forward.prefill(ids),
        lambda: longrope.token_losses(loaded.model, ids),
        lambda: longrope.perplexity(
            str(tmp_path / "m"), texts=["import os\n" * 200 + "<pad>"], lengths=[128]
        ),
    ):
        with pytest.raises(ValueError, match=named):
            path()
