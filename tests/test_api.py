"""The public Python API on models in memory; only public names are used."""

import doctest
import importlib
import json
import logging
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

import longrope
from longrope.models.bundled import BUNDLED

QUICK = longrope.GradientSearchConfig(windows=2, budget=8)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)


@pytest.fixture(scope="module")
def texts_in_memory(texts):
    return [file.read_text() for file in sorted(Path(texts).glob("*.txt"))]


def history(directory):
    lines = (Path(directory) / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_search_in_memory_is_the_search_by_path(model, tokenizer, texts, tmp_path):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.train()
    asked = {"target_length": "2x", "config": QUICK, "seed": 3}
    found = longrope.search_factors(
        model, tokenizer, texts=Path(texts), output_dir=tmp_path / "memory", **asked
    )
    by_path = longrope.search_factors(
        "bundled",
        texts=Path(texts),
        output_dir=tmp_path / "path",
        execution=longrope.ExecutionConfig(dtype="float32"),
        **asked,
    )
    assert found.best == by_path.best
    assert history(tmp_path / "memory") == history(tmp_path / "path")
    # The model is as it was: weights, no gradients, its mode, its own rotary module.
    assert all(weight.equal(before[name]) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert type(model.model.rotary_emb).__name__ == "LlamaRotaryEmbedding"


# peft reads a property that transformers will drop
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "kind", ["bfloat16", pytest.param("device_map", marks=pytest.mark.slow), "peft"]
)
def test_models_as_people_have_them(kind, model, tokenizer, texts_in_memory, tmp_path):
    if kind == "bfloat16":
        model = model.to(torch.bfloat16)
    if kind == "device_map":
        model = AutoModelForCausalLM.from_pretrained(BUNDLED, device_map="cpu")
    if kind == "peft":
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(model, adapters)
    ids = torch.randint(3, 1500, (1, 120), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[:, :-1].float()
    expected = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    tolerance = 0.05 if kind == "bfloat16" else 1e-4
    assert_close(longrope.token_losses(model, ids), expected, atol=tolerance, rtol=tolerance)
    rows = longrope.perplexity(
        model, tokenizer, texts_in_memory, lengths=[256], tokens_per_document=256
    )
    assert rows[0]["perplexity"] > 1
    found = longrope.search_factors(
        model,
        tokenizer,
        target_length="2x",
        texts=texts_in_memory,
        output_dir=tmp_path,
        config=longrope.GradientSearchConfig(windows=1, budget=6, transfer="none"),
    )
    assert found.best.max_position_embeddings == 512
    assert len(found.best.factors) == 32


# peft reads a property that transformers will drop
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_active_adapter_belongs_to_the_model(model, tokenizer, texts_in_memory, tmp_path):
    """A search of a model under another adapter is another search."""
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    adapters = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(model, adapters)
    model.add_adapter("two", adapters)

    def search():
        return longrope.search_factors(
            model,
            tokenizer,
            target_length="2x",
            texts=texts_in_memory,
            output_dir=tmp_path,
            config=longrope.GradientSearchConfig(windows=1, budget=4, transfer="none"),
        )

    prompts = get_peft_model(
        AutoModelForCausalLM.from_pretrained(BUNDLED),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    )
    with pytest.raises(ValueError, match=r"learned prompts of PEFT \(PROMPT_TUNING\)"):
        longrope.token_losses(prompts, torch.arange(3, 40)[None])
    first = search()
    assert search().best == first.best
    model.set_adapter("two")
    with pytest.raises(ValueError, match="another search"):
        search()
    model.set_adapter("default")
    layers = [part for part in model.modules() if hasattr(part, "set_scale")]
    for layer in layers:
        layer.set_scale("default", 4.0)
    with pytest.raises(ValueError, match="another search"):
        search()
    for layer in layers:
        layer.set_scale("default", 1.0)
    with model.disable_adapter(), pytest.raises(ValueError, match="another search"):
        search()


def test_the_state_of_torch_changes_no_result(model, tokenizer, texts_in_memory, tmp_path):
    asked = {"lengths": [512], "tokens_per_document": 512}
    yarn = longrope.methods.yarn(model, target_length="8x")

    def row():
        return longrope.perplexity(model, tokenizer, texts_in_memory, rescale=yarn, **asked)[0]

    expected = row()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert row() == expected
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            assert row() == expected
        finally:
            torch.set_default_dtype(torch.float32)
    search = {"target_length": "2x", "texts": texts_in_memory, "output_dir": tmp_path}
    with torch.inference_mode():
        assert row() == expected
        with pytest.raises(ValueError, match=r"outside torch\.inference_mode"):
            longrope.search_factors(model, tokenizer, **search)


def test_texts_as_people_have_them(tokenizer, texts, texts_in_memory, tmp_path, caplog):
    import datasets

    files = sorted(Path(texts).glob("*.txt"))
    dataset = datasets.Dataset.from_dict({"body": texts_in_memory})
    asked = {"lengths": [256, "2x"], "tokens_per_document": 1024}
    ways = [
        longrope.perplexity("bundled", texts=texts_in_memory, **asked),
        longrope.perplexity("bundled", texts=files, **asked),
        longrope.perplexity("bundled", texts=str(texts), **asked),
        longrope.perplexity("bundled", texts=dataset, field="body", **asked),
    ]
    assert [row["length"] for row in ways[0]] == [256, 512]
    assert all(rows == ways[0] for rows in ways)
    with pytest.raises(ValueError, match=r"texts\[0\] is '.*argparse.txt'"):
        longrope.perplexity("bundled", texts=[str(files[0])], **asked)
    with pytest.raises(ValueError, match="texts is empty"):
        longrope.perplexity("bundled", texts=[], **asked)
    caplog.clear()
    short = longrope.perplexity(
        "bundled", texts=["a short text", *texts_in_memory], lengths=[256], tokens_per_document=256
    )
    assert short[0]["documents"] == len(texts_in_memory)
    (said,) = (r.getMessage() for r in caplog.records if "left out" in r.getMessage())
    assert f"1 of {1 + len(texts_in_memory)} documents" in said and "256 tokens" in said
    for table in (dataset.to_dict(), dataset.to_pandas()):
        with pytest.raises(ValueError, match=f"texts is a {type(table).__name__}"):
            longrope.perplexity("bundled", texts=table, **asked)


def test_a_rescale_is_applied_and_removed(model):
    ids = torch.randint(3, 1500, (1, 40), generator=torch.Generator().manual_seed(0))
    yarn = longrope.methods.yarn(longrope.inspect_model(model), target_length="8x")
    pi = longrope.methods.pi(longrope.inspect_model("bundled"), target_length=2048)

    @torch.no_grad()
    def logits():
        return model.eval()(input_ids=ids).logits

    plain = logits()
    with longrope.rescaled(model, yarn):
        under_yarn = logits()
    longrope.apply_rescale(model, pi)
    longrope.apply_rescale(model, yarn)  # takes the place of the one before
    assert torch.equal(logits(), under_yarn)
    assert not torch.allclose(plain, under_yarn, atol=0.1)
    longrope.remove_rescale(model)
    longrope.remove_rescale(model)
    assert torch.equal(logits(), plain)
    assert not model._forward_pre_hooks
    assert not model.model._forward_pre_hooks


def test_what_cannot_be_done_in_memory_is_refused(model, tokenizer, texts, tmp_path):
    def search(model, tokenizer=tokenizer, **changes):
        asked = {"target_length": "2x", "texts": Path(texts), "output_dir": tmp_path, **changes}
        return longrope.search_factors(model, tokenizer, **asked)

    with pytest.raises(ValueError, match="tokenizer is missing"):
        search(model, None)
    for name, value in (("dtype", "bfloat16"), ("device", "cpu"), ("offload_weights", True)):
        with pytest.raises(ValueError, match=f"{name} is {value!r}"):
            search(model, execution=longrope.ExecutionConfig(**{name: value}))
    with pytest.raises(ValueError, match="model is a Linear"):
        search(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="target is"):
        search(model, target_length=128)
    model.model.layers[0].to("meta")
    with pytest.raises(ValueError, match="spread over cpu, meta"):
        search(model)
    model.to("meta")
    with pytest.raises(ValueError, match="no embeddings in memory"):
        longrope.token_losses(model, torch.arange(3, 40)[None])


def test_an_extended_model_generates_across_the_boundary(finished, tmp_path, caplog):
    """Plain ``generate`` and a pipeline, per row, without a warning about the old length."""
    out, _ = finished
    model = longrope.from_pretrained(out, dtype="float32")
    _, pair = longrope.load_extended(str(out), longrope.ExecutionConfig(dtype="float32"))
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    boundary = pair.recovery_length
    ids = torch.randint(3, 1500, (1, boundary - 3), generator=torch.Generator().manual_seed(0))
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    model.generation_config.eos_token_id = None
    caplog.clear()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        text = tokenizer.decode(ids[0])
        written = pipeline("text-generation", model=model, tokenizer=tokenizer)(text, **how)
    assert not [record for record in caplog.records if "length" in record.getMessage()]
    assert len(written[0]["generated_text"]) > len(text)
    row = ids[0].tolist()
    plain, _ = longrope.load_extended(str(out), longrope.ExecutionConfig(dtype="float32"))
    for token in found[0, ids.shape[1] :].tolist():  # each without a cache, under its own factors
        with torch.no_grad(), longrope.rescaled(plain.model, pair.choose(len(row))):
            logits = plain.model(input_ids=torch.tensor([row])).logits[0, -1]
        assert logits[token] >= logits.max() - 1e-3
        row.append(token)
    assert len(row) > boundary
    model.generation_config.pad_token_id = 2
    model.save_pretrained(tmp_path)
    saved, exported = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (tmp_path, out / "model")
    )
    long = torch.randint(3, 1500, (1, 600), generator=torch.Generator().manual_seed(1))
    longrope.export(out, tmp_path / "run.gguf", format="gguf", dtype="float32")
    longrope.from_pretrained(tmp_path / "run.gguf", dtype="float32").save_pretrained(tmp_path / "g")
    of_gguf = AutoModelForCausalLM.from_pretrained(tmp_path / "g", dtype=torch.float32).eval()
    for n in (boundary, 600):
        with torch.no_grad():
            expected = exported(input_ids=long[:, :n]).logits
            assert_close(saved(input_ids=long[:, :n]).logits, expected)
            assert_close(of_gguf(input_ids=long[:, :n]).logits, expected, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="source is 'bundled'"):
        longrope.from_pretrained("bundled")


def test_a_model_of_a_run_is_measured_under_its_factors_and_restored(finished, texts, tmp_path):
    out, _ = finished
    model = longrope.from_pretrained(out, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    plain, pair = longrope.load_extended(str(out), longrope.ExecutionConfig(dtype="float32"))
    ids = torch.randint(3, 1500, (1, 700), generator=torch.Generator().manual_seed(0))
    lengths = pair.recovery_length, 700

    def logits():
        with torch.no_grad():
            return [model(input_ids=ids[:, :n]).logits for n in lengths]

    before = logits()
    text, asked = Path(texts), {"tokens_per_document": 512}
    for length in (128, 512):
        rows = longrope.perplexity(model, tokenizer, text, lengths=[length], **asked)
        assert longrope.perplexity(str(out), texts=text, lengths=[length], **asked) == rows
        (expected,) = longrope.perplexity(
            *(plain.model, tokenizer, text),
            lengths=[length],
            rescale=pair.choose(length),
            **asked,
        )
        assert rows[0]["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    for found, n in zip(before, lengths, strict=True):
        losses = -found[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:n, None])[..., 0]
        assert_close(longrope.token_losses(model, ids[:, :n]), losses, atol=1e-4, rtol=1e-4)
    longrope.apply_rescale(model, longrope.methods.yarn(plain.info, target_length=1024))
    assert not torch.equal(logits()[1], before[1])
    longrope.remove_rescale(model)
    search = {"target_length": 512, "texts": text, "output_dir": tmp_path / "search"}
    with pytest.raises(ValueError, match=r"rope_scaling='keep'.*'replace'"):
        longrope.search_factors(model, tokenizer, **search)
    least = longrope.GradientSearchConfig(windows=1, budget=4, transfer="none")
    longrope.search_factors(model, tokenizer, rope_scaling="replace", config=least, **search)
    for found, expected in zip(logits(), before, strict=True):
        assert torch.equal(found, expected)


def test_an_extension_reads_paths(model, tmp_path):
    extend = {"target_length": "2x", "output_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match=r"model is a LlamaForCausalLM in memory.*save_pretrained"):
        longrope.extend(model, data="python-library", **extend)
    for text in ("word " * 1000, "a line\nand another", 5):
        with pytest.raises(ValueError, match=r"data has .*, which is no path") as refused:
            longrope.extend("bundled", data=[text], **extend)
        assert len(str(refused.value)) < 300
    assert not (tmp_path / "out").exists()


def test_an_extension_exports_and_verifies(finished, arguments, tmp_path):
    out, _ = finished
    assert longrope.extend(output_dir=out, recipe=str(arguments[1])) == out  # all of it is done
    longrope.export(out, tmp_path / "model")
    verdict = longrope.verify(tmp_path / "model", prompts=1)
    assert verdict.right
    with pytest.raises(ValueError, match="no option 'quick'"):
        longrope.export(out, tmp_path / "other", quick=True)


def test_a_rescale_is_written_into_a_config(model, tmp_path):
    yarn = longrope.methods.yarn(longrope.inspect_model(model), target_length="8x")
    model.config.rope_parameters = yarn.to_hf(model.config)
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 1500, (1, 500), generator=torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    own = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    with torch.no_grad(), longrope.rescaled(own, yarn):
        assert_close(plain(input_ids=ids).logits, own(input_ids=ids).logits, atol=2e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="start_tokens is 4"):
        yarn.replace(start_tokens=4).to_hf(model.config)


@pytest.mark.parametrize("name", [n for n in longrope.__all__ if n != "__version__"])
def test_public_names_are_documented_and_their_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value = getattr(longrope, name)
    assert value.__doc__
    module = importlib.import_module(value.__module__ if name != "methods" else value.__name__)
    tests = doctest.DocTestFinder(recurse=name == "methods").find(value, name, module=module)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in tests:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
    assert os.listdir(tmp_path) == []


def test_a_model_that_was_saved_is_still_read(model, tmp_path):
    before = longrope.inspect_model(model)
    model.save_pretrained(tmp_path)
    after = longrope.inspect_model(model)
    assert (after.dtype, after.kv_bytes_per_token) == (before.dtype, before.kv_bytes_per_token)


@pytest.mark.parametrize("text", ["word " * 2000, "x" * 300, "nul\0nul " * 300])
def test_a_paragraph_without_line_breaks_is_a_text(text):
    rows = longrope.perplexity(
        "bundled", texts=["", text * 10], lengths=[256], tokens_per_document=256
    )
    assert rows[0]["tokens"] >= 255


def test_perplexity_is_that_of_the_factors_that_are_applied(model, tokenizer, texts_in_memory):
    asked = {"lengths": ["4x"], "tokens_per_document": 1024}
    yarn = longrope.methods.yarn(model, target_length="4x")
    (named,) = longrope.perplexity(model, tokenizer, texts_in_memory, rescale=yarn, **asked)
    (unscaled,) = longrope.perplexity(model, tokenizer, texts_in_memory, **asked)
    longrope.apply_rescale(model, yarn)
    (applied,) = longrope.perplexity(model, tokenizer, texts_in_memory, **asked)
    assert applied == named
    packed = longrope.perplexity(
        model, tokenizer, [text[:900] for text in texts_in_memory], pack=True, **asked
    )
    assert packed[0]["tokens"] == 1023
    with pytest.raises(ValueError, match="lengths is '4x'"):
        longrope.perplexity(model, tokenizer, texts_in_memory, lengths="4x")
    assert applied["perplexity"] < 0.5 * unscaled["perplexity"]
    assert longrope.perplexity(
        model, tokenizer, texts_in_memory, rescale=longrope.methods.pi(model, "4x"), **asked
    ) != [applied]


SCALINGS = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 256},
    "dynamic": {"factor": 2.3},
    "longrope": {
        "short_factor": [1.0] * 32,
        "long_factor": np.linspace(1, 4, 32).tolist(),
        "original_max_position_embeddings": 256,
        "attention_factor": 1.1,
    },
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_model_with_its_own_scaling_is_measured_as_transformers_computes_it(
    kind, tokenizer, texts_in_memory, tmp_path
):
    """Also in chunks: dynamic kinds choose their factors by the positions of a whole sequence."""
    config = AutoConfig.from_pretrained(BUNDLED)
    config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0} | SCALINGS[kind]
    config.max_position_embeddings = 257 if kind == "dynamic" else 1024
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, config=config, dtype=torch.float32).eval()
    tokens = tokenizer(texts_in_memory[0], add_special_tokens=False)["input_ids"][:1024]
    ids = torch.tensor([[tokenizer.bos_token_id, *tokens[:-1]]])
    for length in (200, 1024):
        with torch.no_grad():
            logits = model(input_ids=ids[:, :length], use_cache=False).logits[:, :-1]
        expected = -logits.log_softmax(-1).gather(-1, ids[:, 1:length, None])[..., 0]
        for chunk in (64, 2048):
            execution = longrope.ExecutionConfig(chunk_size=chunk)
            found = longrope.token_losses(model, ids[:, :length], execution=execution)
            assert_close(found, expected, atol=2e-3, rtol=1e-3)
    asked = {"lengths": [1024], "tokens_per_document": 1024}
    (row,) = longrope.perplexity(model, tokenizer, texts_in_memory[:1], **asked)
    assert row["perplexity"] == pytest.approx(expected.mean().exp().item(), rel=1e-4)
    if kind != "dynamic":
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        (by_path,) = longrope.perplexity(tmp_path, texts=texts_in_memory[:1], **asked)
        assert by_path["perplexity"] == pytest.approx(row["perplexity"], rel=1e-5)


def test_a_model_in_memory_is_exported(model, tokenizer, tmp_path):
    yarn = longrope.methods.yarn(model, target_length="8x")
    longrope.apply_rescale(model, yarn)
    longrope.export(model, tmp_path / "out", tokenizer=tokenizer, long_factors=yarn)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.randint(3, 1500, (1, 400), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, expected = exported(ids).logits, model(ids).logits
        longrope.remove_rescale(model)
        unscaled = model(ids).logits
    assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert (logits - unscaled).abs().max() > 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    shared = tmp_path / "shared"
    longrope.export(model, shared, tokenizer=tokenizer, long_factors=yarn, hard_links=True)
    modes = {path.stat().st_mode for path in shared.iterdir()}
    assert len(modes) == 1  # safetensors wrote the weights for their owner alone
    with pytest.raises(ValueError, match="tokenizer is missing"):
        longrope.export(model, tmp_path / "no", long_factors=yarn)


def test_a_quantised_model_is_refused_by_name(model, tokenizer, texts_in_memory, tmp_path):
    model.quantization_method = "bitsandbytes"
    with pytest.raises(ValueError, match=r"quantised \(bitsandbytes"):
        longrope.perplexity(model, tokenizer, texts_in_memory, lengths=[256])
    with pytest.raises(ValueError, match="quantised"):
        longrope.export(model, tmp_path / "no", tokenizer=tokenizer, long_factors="yarn")
