"""Fine-tuning: the loss it minimises, resume, processes, and what must not be lost."""

import json
import math
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

import longrope.train.finetune as finetune_module
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
    windows = {"short": 1.5, "short_length": 64, "batch": settings.batch}
    windows = windows if settings.distill else {}
    pieces = Pieces(documents, loaded.tokenizer, 128, settings.steps * settings.batch, **windows)
    short = loaded.facts.rescale("none", 64).replace(attention_factor=1.2)
    teacher = load_model(model) if settings.distill else None
    rescale = loaded.facts.rescale("yarn", 256)
    finetune(loaded, rescale, short, pieces, settings, out, these, teacher=teacher)
"""

# accelerate leaves its FSDP configuration aside on CPUs, without a word: made to shard here too.
SHARDED = """
import accelerate.state as state
began = state.AcceleratorState.__init__
def begin(self, *given, fsdp_plugin=None, **named):
    began(self, *given, fsdp_plugin=fsdp_plugin, **named)
    self.fsdp_plugin = fsdp_plugin or getattr(self, "fsdp_plugin", None)
    if self.fsdp_plugin is not None:
        self.distributed_type = state.DistributedType.FSDP
state.AcceleratorState.__init__ = begin
import longrope.train.finetune as module
from torch.distributed.tensor import DTensor
unwrapped = module._unwrapped
def shards(trainer):
    assert all(isinstance(p, DTensor) for p in trainer.model_wrapped.parameters())
    return unwrapped(trainer)
module._unwrapped = shards
"""

DYING = """
import os, signal
from longrope.train.pieces import Pieces
asked = Pieces.__getitem__
def dying(self, number):
    if os.environ["RANK"] == "1" and number > 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return asked(self, number)
Pieces.__getitem__ = dying
"""


def train(checkpoint, texts, out, settings=FAST, **changes):
    loaded = load_model(str(checkpoint), dtype="float32")
    documents = load_documents(loaded.tokenizer, [str(texts)], held_out=False)
    windows = (
        {"short": 1.5, "short_length": 64, "batch": settings.batch} if settings.distill else {}
    )
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


@pytest.mark.parametrize(("fail_at", "lora"), [(0, None), (3, None), (8, None), (8, 2)])
def test_an_interrupted_training_ends_as_if_it_was_not(
    trained, checkpoints, texts, tmp_path, monkeypatch, fail_at, lora
):
    settings = FAST.model_copy(update={"lora": lora})
    whole, expected, _ = trained
    if lora:
        whole = tmp_path / "whole"
        expected, *_ = train(checkpoints("llama"), texts, whole, settings)
    out, asked = tmp_path / "out", Pieces.__getitem__

    def failing(self, number):
        if number == fail_at:
            raise KeyboardInterrupt
        return asked(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(Pieces, "__getitem__", failing)
        with pytest.raises(KeyboardInterrupt):
            train(checkpoints("llama"), texts, out, settings)
    lines, _, _ = train(checkpoints("llama"), texts, out, settings)
    assert lines == expected
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(out)[name]), name


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
    checkpoints, texts, tmp_path, monkeypatch, trained, error
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
    monkeypatch.undo()
    lines, *_ = train(checkpoints("llama"), texts, tmp_path)
    assert lines == trained[1]


def test_a_disk_that_is_full_at_the_end_costs_the_last_steps_at_most(
    checkpoints, texts, tmp_path, monkeypatch, trained
):
    from transformers import PreTrainedModel

    saved = PreTrainedModel.save_pretrained

    def full(self, directory, *args, **kwargs):
        if "checkpoint-" in str(directory):
            return saved(self, directory, *args, **kwargs)
        raise SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(ValueError, match=r"model: cannot be written \(Error while.*No space left"):
        train(checkpoints("llama"), texts, tmp_path)
    assert not (tmp_path / "model").exists()
    monkeypatch.undo()
    lines, *_ = train(checkpoints("llama"), texts, tmp_path)
    assert lines == trained[1]
    for name, weight in weights(trained[0]).items():
        assert torch.equal(weight, weights(tmp_path)[name]), name


def test_a_process_that_dies_ends_the_training_and_one_goes_on(
    checkpoints, texts, tmp_path, trained
):
    program, out = tmp_path / "program.py", tmp_path / "out"
    program.write_text(DYING + PROGRAM)
    command = (
        *("-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone", program),
        *(checkpoints("llama"), texts, out, json.dumps(FAST.model_dump())),
    )
    done = launched(*command, code=1)
    assert "another process of this run died" in done.stderr
    assert "cannot be written" not in done.stderr
    whole = [c.parent.name for c in (out / "checkpoints").glob("*/complete.json")]
    assert whole == ["checkpoint-2"]
    program.write_text(PROGRAM)
    launched(*command)
    lines = [json.loads(line)["loss"] for line in (out / "loss.jsonl").read_text().splitlines()]
    assert lines == pytest.approx([line["loss"] for line in trained[1]], abs=2e-3)


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


def launched(*command, code=0, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


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
    program.write_text(SHARDED + PROGRAM if sharded else PROGRAM)
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


def test_lora_on_a_tied_model_leaves_what_was_trained(texts, tmp_path, monkeypatch):
    """The bundled model's embeddings are its head too: trained apart, one would be lost."""
    trained = {}

    def keep(model, state, loaded, path):
        ids = torch.arange(100, 160)[None]
        with torch.no_grad():
            trained["at"] = model.eval()(input_ids=ids).logits
        return saved(model, state, loaded, path)

    saved = finetune_module._save
    monkeypatch.setattr(finetune_module, "_save", keep)
    settings = FAST.model_copy(update={"lora": 2, "steps": 3, "learning_rate": 1e-2})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train("bundled", texts, tmp_path, settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert model.config.tie_word_embeddings
    before = load_model("bundled", dtype="float32").model.state_dict()
    assert not torch.equal(model.state_dict()["lm_head.weight"], before["lm_head.weight"])
    with torch.no_grad():
        logits = model(input_ids=torch.arange(100, 160)[None]).logits
    torch.testing.assert_close(logits, trained["at"], atol=1e-4, rtol=1e-4)


def test_lora_on_a_sharded_model_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"finetune.lora is 8 and ACCELERATE_USE_FSDP is true"):
        finetune_module.require_lora(8)
