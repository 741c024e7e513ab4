"""Fine-tuning: the loss it minimises, resume, processes, and what must not be lost."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from longrope.model import load_model
from longrope.parallel import Ranks
from longrope.rope.install import installed
from longrope.train.finetune import finetune
from longrope.train.pieces import Pieces
from longrope.train.settings import FinetuneSettings
from longrope.windows import load_documents

LENGTH = 128
FAST = FinetuneSettings(
    steps=6, batch=2, learning_rate=1e-3, warmup=2, precision="float32", save_every=2
)
TAUGHT = FAST.model_copy(update={"distill": True})

PROGRAM = """
import sys, json
from longrope.model import load_model
from longrope.parallel import ranks
from longrope.train.finetune import finetune
from longrope.train.pieces import Pieces
from longrope.train.settings import FinetuneSettings
from longrope.windows import load_documents
from pathlib import Path
model, data, out, changes = sys.argv[1], sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4])
settings = FinetuneSettings(**changes)
with ranks() as these:
    loaded = load_model(model, dtype="float32")
    documents = load_documents(loaded.tokenizer, [data], held_out=False)
    windows = {"short": 2, "short_length": 64} if settings.distill else {}
    pieces = Pieces(documents, loaded.tokenizer, 128, settings.steps * settings.batch, **windows)
    short = loaded.facts.rescale("none", 64).replace(attention_factor=1.2)
    teacher = load_model(model) if settings.distill else None
    rescale = loaded.facts.rescale("yarn", 256)
    finetune(loaded, rescale, short, pieces, settings, out, these, teacher=teacher)
"""


def train(checkpoint, texts, out, settings=FAST, **changes):
    loaded = load_model(str(checkpoint), dtype="float32")
    documents = load_documents(loaded.tokenizer, [str(texts)], held_out=False)
    windows = {"short": 2, "short_length": 64} if settings.distill else {}
    pieces = Pieces(documents, loaded.tokenizer, LENGTH, settings.steps * settings.batch, **windows)
    rescale = loaded.facts.rescale("yarn", 256)
    short = loaded.facts.rescale("none", 64).replace(attention_factor=1.2)
    teacher = load_model(str(checkpoint)) if settings.distill else None
    return (
        finetune(
            loaded, rescale, short, pieces, settings, out, Ranks(), teacher=teacher, **changes
        ),
        loaded,
        pieces,
    )


def weights(out):
    return AutoModelForCausalLM.from_pretrained(out / "model").state_dict()


@pytest.fixture(scope="module")
def trained(checkpoints, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    lines, _, pieces = train(checkpoints("llama"), texts, out)
    return out, lines, pieces


def test_steps_are_those_of_a_plain_loop(checkpoints, trained):
    """Adam, clip and warm-up written out, on the same pieces, under the same rescale."""
    _, lines, pieces = trained
    loaded = load_model(str(checkpoints("llama")), dtype="float32")
    model = loaded.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-8, weight_decay=0.0)
    expected = []
    with installed(model, loaded.facts.rescale("yarn", 256)):
        for step in range(6):
            rate = 1e-3 * (step / 2 if step < 2 else (6 - step) / 4)
            for group in optimizer.param_groups:
                group["lr"] = rate
            ids = torch.stack([pieces[2 * step + i]["input_ids"] for i in range(2)])
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


def test_leaves_a_plain_checkpoint(trained, checkpoints):
    out, _, _ = trained
    loaded = load_model(str(out / "model"))
    assert loaded.facts.existing_scaling is None
    before = AutoModelForCausalLM.from_pretrained(checkpoints("llama")).state_dict()
    assert any(not torch.equal(before[name], new) for name, new in weights(out).items())
    assert not (out / "checkpoints").exists()
    assert loaded.tokenizer("import os")["input_ids"][0] == 0


@pytest.mark.parametrize("fail_at", [0, 3, 8])
def test_an_interrupted_training_ends_as_if_it_was_not(
    trained, checkpoints, texts, tmp_path, monkeypatch, fail_at
):
    asked = Pieces.__getitem__

    def failing(self, number):
        if number == fail_at:
            raise KeyboardInterrupt
        return asked(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(Pieces, "__getitem__", failing)
        with pytest.raises(KeyboardInterrupt):
            train(checkpoints("llama"), texts, tmp_path)
    lines, _, _ = train(checkpoints("llama"), texts, tmp_path)
    out, expected, _ = trained
    assert lines == expected
    for name, weight in weights(out).items():
        assert torch.equal(weight, weights(tmp_path)[name]), name


def test_killed_after_the_model_was_written_it_is_not_trained_again(
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


def test_a_loss_that_is_not_finite_stops_it_and_the_checkpoint_stands(
    checkpoints, texts, tmp_path, monkeypatch
):
    asked = Pieces.__getitem__

    def poisoned(self, number):
        piece = asked(self, number)
        return piece | {"weights": piece["weights"] * math.nan} if number == 7 else piece

    monkeypatch.setattr(Pieces, "__getitem__", poisoned)
    with pytest.raises(ValueError, match=r"the loss is nan at step 4.*learning_rate"):
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
    checkpoints, texts, tmp_path, monkeypatch, error
):
    from transformers import Trainer

    saved = Trainer._save_optimizer_and_scheduler

    def full(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise error
        return saved(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(ValueError, match=r"No space left on device.*last whole checkpoint"):
        train(checkpoints("llama"), texts, tmp_path)
    assert (tmp_path / "checkpoints" / "checkpoint-2" / "complete.json").exists()


def test_no_pickle_of_a_checkpoint_is_trusted(checkpoints, texts, tmp_path, monkeypatch):
    import pickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    asked = Pieces.__getitem__

    def failing(self, number):
        if number == 10:
            raise KeyboardInterrupt
        return asked(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(Pieces, "__getitem__", failing)
        with pytest.raises(KeyboardInterrupt):
            train(checkpoints("llama"), texts, tmp_path)
    checkpoint = tmp_path / "checkpoints" / "checkpoint-4"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert (checkpoint / name).exists()
        torch.save(Evil(), checkpoint / name)
        with pytest.raises(pickle.UnpicklingError):
            train(checkpoints("llama"), texts, tmp_path)
    assert not (tmp_path / "owned").exists()


def launched(*command, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def taught(checkpoints, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("taught")
    lines, *_ = train(checkpoints("llama"), texts, out, TAUGHT)
    return out, lines


@pytest.mark.parametrize("distill", [False, True], ids=["text", "teacher"])
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_train_as_one(
    checkpoints, texts, tmp_path, trained, taught, sharded, distill
):
    one = taught if distill else trained
    changes = (TAUGHT if distill else FAST).model_dump()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {}
    if sharded:
        environment = {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # the launcher's default
        }
    out = tmp_path / "out"
    command = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone", program)
    launched(*command, checkpoints("llama"), texts, out, json.dumps(changes), **environment)
    lines = [json.loads(line) for line in (out / "loss.jsonl").read_text().splitlines()]
    expected = one[1]
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    torch.testing.assert_close(
        torch.tensor([line["loss"] for line in lines]),
        torch.tensor([line["loss"] for line in expected]),
        atol=2e-3,
        rtol=0,
    )
    for name, weight in weights(one[0]).items():
        torch.testing.assert_close(weights(out)[name], weight, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"lora": 2}], ids=["bf16", "lora"])
def test_a_teacher_is_there_in_every_way_of_training(checkpoints, texts, tmp_path, taught, changes):
    settings = TAUGHT.model_copy(update=changes)
    lines, *_ = train(checkpoints("llama"), texts, tmp_path, settings)
    assert lines[0]["loss"] == pytest.approx(taught[1][0]["loss"], abs=0.02)


def test_lora_trains_embeddings_and_norms_too_and_leaves_a_plain_checkpoint(
    checkpoints, texts, tmp_path
):
    settings = FAST.model_copy(update={"lora": 2, "steps": 3})
    lines, _, _ = train(checkpoints("llama"), texts, tmp_path, settings)
    assert len(lines) == 3
    before = AutoModelForCausalLM.from_pretrained(checkpoints("llama")).state_dict()
    after = weights(tmp_path)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for part in ("embed_tokens", "input_layernorm", "model.norm", "q_proj", "down_proj"):
        assert any(part in name for name in changed), part
    update = after["model.layers.1.self_attn.q_proj.weight"].double()
    update -= before["model.layers.1.self_attn.q_proj.weight"].double()
    assert torch.linalg.matrix_rank(update, atol=1e-5) <= 2
