"""Fine-tuning by one process: steps, resuming, full disks and non-finite losses."""

import hashlib
import json
import math
import os
import pickle
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from longrope.execution import ExecutionConfig
from longrope.files.stores import read_lines
from longrope.models.load import load_model
from longrope.models.weights import stored_tensors
from longrope.rope.apply import rescaled
from longrope.train.dataset import LongContextDataset
from small_training import FAST, TAUGHT, train, weights


def test_steps_are_those_of_a_plain_loop(checkpoints, trained):
    """Adam, clipping and warm-up written out, on the same sequences and rescale."""
    _, lines, sequences = trained
    loaded = load_model(str(checkpoints("llama")), ExecutionConfig(dtype="float32"))
    model = loaded.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-8, weight_decay=0.0)
    expected = []
    with rescaled(model, loaded.info.rescale("yarn", 256)):
        for step in range(6):
            rate = 1e-3 * (step / 2 if step < 2 else (6 - step) / 4)
            for group in optimizer.param_groups:
                group["lr"] = rate
            ids = torch.stack([sequences[2 * step + i]["input_ids"] for i in range(2)])
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            expected.append(loss.item())
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    torch.testing.assert_close(
        torch.tensor([line["loss"] for line in lines]), torch.tensor(expected), atol=2e-3, rtol=0
    )


def test_the_environment_does_not_change_the_precision(
    trained, checkpoints, texts, tmp_path, monkeypatch
):
    """``accelerate launch`` sets the variable from its own configuration."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(checkpoints("llama"), texts, tmp_path / "out")
    expected, found = weights(trained[0]), weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.slow
def test_a_compiled_model_is_written_under_its_own_names(
    trained, checkpoints, texts, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    train(checkpoints("llama"), texts, tmp_path / "out")
    expected, found = weights(trained[0]), weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-3)


def test_leaves_a_plain_checkpoint(trained, checkpoints):
    out, _, _ = trained
    loaded = load_model(str(out / "model"))
    assert loaded.info.rope_scaling is None
    before = AutoModelForCausalLM.from_pretrained(checkpoints("llama")).state_dict()
    assert any(not torch.equal(before[name], new) for name, new in weights(out).items())
    assert not (out / "checkpoints").exists()
    assert loaded.tokenizer("import os")["input_ids"][0] == 0
    # Gradient checkpointing switches the cache off for the training alone.
    assert loaded.model.config.use_cache is True


@pytest.mark.parametrize("precision", ["float32", "pure-bf16"])
def test_each_tensor_keeps_its_dtype(precision, checkpoints, texts, tmp_path):
    """A bfloat16 model stays one, and what it holds in float32 is not rounded."""
    source = shutil.copytree(checkpoints("deepseek_v3"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    bias = "e_score_correction_bias"
    for name, tensor in tensors.items():
        value = torch.rand_like(tensor) if name.endswith(bias) else tensor
        tensors[name] = value.to(torch.float32 if name.endswith(bias) else torch.bfloat16)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config))
    settings = FAST.model_copy(update={"steps": 1, "warmup": 0, "precision": precision})
    train(source, texts, tmp_path / "out", settings, dtype="auto")
    found = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in tensors.items()}
    kept = [name for name in tensors if torch.equal(found[name], tensors[name])]
    assert {name for name in tensors if name.endswith(bias)} <= set(kept) != set(tensors)
    loaded = load_model(str(tmp_path / "out" / "model"))
    assert loaded.info.dtype == "bfloat16" and loaded.model.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("place", "lora"), [("model.layers.4.", None), ("model.layers.4.", 2), ("mtp.layers.0.", None)]
)
def test_layers_that_predict_further_tokens_are_kept(place, lora, checkpoints, texts, tmp_path):
    """transformers does not load them, and the config still promises them."""
    source = shutil.copytree(checkpoints("deepseek_v3"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    further = {
        name.replace("model.layers.3.", start): torch.rand_like(tensor.float())
        for name, tensor in tensors.items()
        if name.startswith("model.layers.3.")
        for start in (place, "model.layers.5.")
    }
    save_file(tensors | further, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    settings = FAST.model_copy(update={"steps": 1, "warmup": 0, "lora": lora})
    train(source, texts, tmp_path / "out", settings)
    found = {name: part[:] for name, part in stored_tensors(tmp_path / "out" / "model")}
    kept = {name for name in further if name.startswith(place)}
    assert found.keys() == tensors.keys() | kept
    assert kept and all(torch.equal(found[name], further[name]) for name in kept)
    assert any(not torch.equal(found[name], tensor) for name, tensor in tensors.items())
    again = load_model(str(tmp_path / "out" / "model")).model.state_dict()
    assert torch.equal(again["model.norm.weight"], found["model.norm.weight"])


@pytest.mark.parametrize(
    ("fail_at", "lora"),
    [
        pytest.param(0, None, marks=pytest.mark.slow),
        (3, None),
        pytest.param(8, None, marks=pytest.mark.slow),
        (8, 2),
    ],
)
def test_interrupted_training_resumes_exactly(
    trained, checkpoints, texts, tmp_path, monkeypatch, fail_at, lora
):
    settings = FAST.model_copy(update={"lora": lora})
    whole, expected, _ = trained
    if lora:
        whole = tmp_path / "whole"
        expected, *_ = train(checkpoints("llama"), texts, whole, settings)
    out, asked = tmp_path / "out", LongContextDataset.__getitem__

    def failing(self, number):
        if number == fail_at:
            raise KeyboardInterrupt
        return asked(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(LongContextDataset, "__getitem__", failing)
        with pytest.raises(KeyboardInterrupt):
            train(checkpoints("llama"), texts, out, settings)
    lines, _, _ = train(checkpoints("llama"), texts, out, settings)
    assert lines == expected
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(out)[name]), name


def test_ctrl_c_ends_the_step_and_writes_its_checkpoint(
    checkpoints, texts, tmp_path, trained, monkeypatch
):
    whole, lines, _ = trained
    asked, handler = LongContextDataset.__getitem__, signal.getsignal(signal.SIGINT)

    def interrupting(self, number):
        if number == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return asked(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(LongContextDataset, "__getitem__", interrupting)
        with pytest.raises(KeyboardInterrupt):
            train(checkpoints("llama"), texts, tmp_path)
    known = read_lines(tmp_path / "loss.jsonl")
    assert 3 <= len(known) < 6
    assert (tmp_path / "checkpoints" / f"checkpoint-{len(known)}" / "complete.json").exists()
    assert signal.getsignal(signal.SIGINT) is handler
    again, _, _ = train(checkpoints("llama"), texts, tmp_path)
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]
    assert all(
        torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(tmp_path).items()
    )


def test_training_is_not_repeated_after_the_model_was_written(
    checkpoints, texts, tmp_path, trained
):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    half_deleted = tmp_path / "checkpoints" / "checkpoint-6"
    half_deleted.mkdir(parents=True)
    (half_deleted / "complete.json").write_text("{}")
    before = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    lines, _, _ = train(checkpoints("llama"), texts, tmp_path)
    assert lines == trained[1]
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert not half_deleted.exists()


def test_a_checkpoint_cut_short_is_not_resumed_from(checkpoints, texts, tmp_path, trained):
    broken = tmp_path / "checkpoints" / "checkpoint-4"
    broken.mkdir(parents=True)
    (broken / "model.safetensors").write_bytes(b"half of it")
    lines, _, _ = train(checkpoints("llama"), texts, tmp_path)
    assert lines == trained[1]


@pytest.fixture(scope="module")
def interrupted(checkpoints, texts, tmp_path_factory):
    """A training that was interrupted after two checkpoints."""
    out, asked = tmp_path_factory.mktemp("interrupted"), LongContextDataset.__getitem__

    def failing(self, number):
        if number == 10:
            raise KeyboardInterrupt
        return asked(self, number)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LongContextDataset, "__getitem__", failing)
        with pytest.raises(KeyboardInterrupt):
            train(checkpoints("llama"), texts, out)
    found = {directory.name for directory in (out / "checkpoints").iterdir()}
    assert found == {"checkpoint-2", "checkpoint-4"}
    return out


def cut(name):
    def damage(checkpoint):
        file = checkpoint / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return damage


def one_bit(checkpoint):
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-9] ^= 64
    (checkpoint / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "checkpoints_left"),
    [
        (cut("optimizer.pt"), 1),
        (cut("model.safetensors"), 0),
        (lambda checkpoint: (checkpoint / "rng_state.pth").write_bytes(b""), 1),
        pytest.param(lambda c: (c / "scheduler.pt").unlink(), 1, marks=pytest.mark.slow),
        pytest.param(one_bit, 1, marks=pytest.mark.slow),
        pytest.param(lambda c: (c / "complete.json").write_text("["), 1, marks=pytest.mark.slow),
    ],
    ids=["optimizer", "every model", "rng", "scheduler", "one bit", "marker"],
)
def test_a_damaged_checkpoint_falls_back_to_the_last_whole_one(
    checkpoints, texts, tmp_path, trained, interrupted, caplog, capsys, damage, checkpoints_left
):
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    work = tmp_path / "checkpoints"
    damage(work / "checkpoint-4")
    if not checkpoints_left:
        damage(work / "checkpoint-2")
    capsys.readouterr()
    lines, _, _ = train(checkpoints("llama"), texts, tmp_path)
    assert lines == trained[1]
    for name, weight in weights(trained[0]).items():
        assert torch.equal(weight, weights(tmp_path)[name]), name
    said = " ".join(capsys.readouterr().err.split())
    assert ("resuming after step 2 of 6; 2 steps are repeated" in said) == bool(checkpoints_left)
    assert ("no whole checkpoint: 4 steps" in said) == (not checkpoints_left)
    assert "checkpoint-4 is damaged and is not used" in caplog.text
    assert ("starts from its first step" in caplog.text) == (not checkpoints_left)


def test_a_loss_that_is_not_finite_stops_it_and_the_checkpoint_stands(
    checkpoints, texts, tmp_path, monkeypatch
):
    asked = LongContextDataset.__getitem__

    def poisoned(self, number):
        sequence = asked(self, number)
        return sequence | {"weights": sequence["weights"] * math.nan} if number == 7 else sequence

    monkeypatch.setattr(LongContextDataset, "__getitem__", poisoned)
    with pytest.raises(ValueError, match=r"loss is nan .*step 4;.*learning_rate"):
        train(checkpoints("llama"), texts, tmp_path)
    assert (tmp_path / "checkpoints" / "checkpoint-2" / "complete.json").exists()
    monkeypatch.undo()
    lines, _, _ = train(checkpoints("llama"), texts, tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("No space left on device [enforce fail at inline_container.cc:664]"),
        SafetensorError("Error while serializing: No space left on device"),
    ],
    ids=["python", "torch", "safetensors"],
)
def test_a_full_disk_is_one_line_and_the_checkpoint_stands(
    checkpoints, texts, tmp_path, monkeypatch, trained, error
):
    from transformers import Trainer

    saved = Trainer._save_optimizer_and_scheduler

    def full(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise error
        return saved(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(ValueError, match=r"No space left on device.*last checkpoint"):
        train(checkpoints("llama"), texts, tmp_path)
    assert (tmp_path / "checkpoints" / "checkpoint-2" / "complete.json").exists()
    monkeypatch.undo()
    lines, *_ = train(checkpoints("llama"), texts, tmp_path)
    assert lines == trained[1]


def test_a_full_disk_at_the_end_keeps_the_last_checkpoint(
    checkpoints, texts, tmp_path, monkeypatch, trained
):
    from transformers import PreTrainedModel

    saved = PreTrainedModel.save_pretrained

    def full(self, directory, *args, **kwargs):
        if "checkpoint-" in str(directory):
            return saved(self, directory, *args, **kwargs)
        raise SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(ValueError, match=r"model .*\(Error while.*No space left"):
        train(checkpoints("llama"), texts, tmp_path)
    assert not (tmp_path / "model").exists()
    monkeypatch.undo()
    lines, *_ = train(checkpoints("llama"), texts, tmp_path)
    assert lines == trained[1]
    for name, weight in weights(trained[0]).items():
        assert torch.equal(weight, weights(tmp_path)[name]), name


def test_no_pickle_of_a_checkpoint_is_trusted(checkpoints, texts, tmp_path, monkeypatch):

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    asked = LongContextDataset.__getitem__

    def failing(self, number):
        if number == 10:
            raise KeyboardInterrupt
        return asked(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(LongContextDataset, "__getitem__", failing)
        with pytest.raises(KeyboardInterrupt):
            train(checkpoints("llama"), texts, tmp_path)
    checkpoint = tmp_path / "checkpoints" / "checkpoint-4"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert (checkpoint / name).exists()
        torch.save(Evil(), checkpoint / name)
        marker = checkpoint / "complete.json"  # as if longrope had written the file
        content = json.loads(marker.read_text())
        content["files"][name] = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
        marker.write_text(json.dumps(content))
        with pytest.raises(pickle.UnpicklingError):
            train(checkpoints("llama"), texts, tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"lora": 2}], ids=["bf16", "lora"])
def test_distillation_works_with_every_setting(checkpoints, texts, tmp_path, taught, changes):
    settings = TAUGHT.model_copy(update=changes)
    lines, *_ = train(checkpoints("llama"), texts, tmp_path, settings)
    assert lines[0]["loss"] == pytest.approx(taught[1][0]["loss"], abs=0.02)
