"""Fine-tuning by two processes: equal to one, with and without FSDP, and after a death."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from program import run, succeeds
from small_training import FAST, TAUGHT, weights

PROGRAM = """
import json, sys
from pathlib import Path
from longrope.distributed import ranks
from longrope.train.config import FinetuneConfig
from program import run, succeeds
from small_training import train
model, data, out, changes = sys.argv[1:]
with ranks() as these:
    train(model, data, Path(out), FinetuneConfig(**json.loads(changes)), these)
"""

# accelerate silently ignores FSDP on CPUs, so it is forced here.
SHARDED = """
import accelerate.state as state
began = state.AcceleratorState.__init__
def begin(self, *given, fsdp_plugin=None, **named):
    began(self, *given, fsdp_plugin=fsdp_plugin, **named)
    self.fsdp_plugin = fsdp_plugin or getattr(self, "fsdp_plugin", None)
    if self.fsdp_plugin is not None:
        self.distributed_type = state.DistributedType.FSDP
state.AcceleratorState.__init__ = begin
import longrope.train.trainer as module
from torch.distributed.tensor import DTensor
unwrapped = module._unwrapped
def shards(trainer):
    assert all(isinstance(p, DTensor) for p in trainer.model_wrapped.parameters())
    return unwrapped(trainer)
module._unwrapped = shards
"""

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # the launcher's default
}

DYING = """
import os, signal
from longrope.train.dataset import LongContextDataset
asked = LongContextDataset.__getitem__
def dying(self, number):
    if os.environ["RANK"] == "1" and number > 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return asked(self, number)
LongContextDataset.__getitem__ = dying
"""


@pytest.mark.parametrize(
    ("sharded", "distill"),
    [
        pytest.param(False, False, id="ddp-text", marks=pytest.mark.slow),
        pytest.param(False, True, id="ddp-teacher"),
        pytest.param(True, False, id="fsdp2-text", marks=pytest.mark.slow),
        pytest.param(True, True, id="fsdp2-teacher"),
    ],
)
def test_two_processes_train_as_one(
    checkpoints, texts, tmp_path, trained, taught, sharded, distill
):
    one = taught if distill else trained
    changes = (TAUGHT if distill else FAST).model_dump()
    environment = FSDP if sharded else {}
    out = tmp_path / "out"
    asked = checkpoints("llama"), texts, out, json.dumps(changes)
    succeeds(*asked, code=SHARDED + PROGRAM if sharded else PROGRAM, ranks=2, env=environment)
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


@pytest.mark.slow
def test_fsdp_trains_a_model_that_keeps_parameters_in_float32(checkpoints, texts, tmp_path):
    """transformers has the routers of a bfloat16 DeepSeek-V3 so."""
    model = shutil.copytree(checkpoints("deepseek_v3"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"dtype": "bfloat16"}
    (model / "config.json").write_text(json.dumps(config))
    tensors = load_file(model / "model.safetensors")
    rough = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(rough, model / "model.safetensors", metadata={"format": "pt"})
    changes = FAST.model_copy(update={"steps": 1, "warmup": 0, "precision": "pure-bf16"})
    asked = model, texts, tmp_path / "out", json.dumps(changes.model_dump())
    code = SHARDED + PROGRAM.replace("these)", "these, dtype='auto')")
    environment = FSDP | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "DeepseekV3DecoderLayer"}
    environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # accelerate shards no buffers
    succeeds(*asked, code=code, ranks=2, env=environment)
    found = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert found.keys() == rough.keys()
    assert any(not torch.equal(found[name], tensor) for name, tensor in rough.items())
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


@pytest.mark.slow
def test_parameters_that_text_does_not_use_are_frozen(checkpoints, texts, tmp_path):
    """DDP waits for the gradients of all trained parameters."""
    out, before = tmp_path / "out", checkpoints("mistral3")
    succeeds(before, texts, out, json.dumps(FAST.model_dump()), code=PROGRAM, ranks=2)
    first, last = (load_file(path / "model.safetensors") for path in (before, out / "model"))
    stayed = {name for name, weight in first.items() if torch.equal(last[name], weight)}
    assert any("vision" in name for name in stayed)
    assert all("vision" in name or "projector" in name for name in stayed)


def test_training_resumes_after_a_process_died(checkpoints, texts, tmp_path, trained):
    out = tmp_path / "out"
    asked = checkpoints("llama"), texts, out, json.dumps(FAST.model_dump())
    done = run(*asked, code=DYING + PROGRAM, ranks=2)
    assert done.returncode != 0
    assert "another process of this run died" in done.stderr
    assert "cannot be written" not in done.stderr
    whole = [c.parent.name for c in (out / "checkpoints").glob("*/complete.json")]
    assert whole == ["checkpoint-2"]
    succeeds(*asked, code=PROGRAM, ranks=2)
    lines = [json.loads(line)["loss"] for line in (out / "loss.jsonl").read_text().splitlines()]
    assert lines == pytest.approx([line["loss"] for line in trained[1]], abs=2e-3)
