"""What a training step holds and takes through transformers' attention, and through ours.

    python benchmarks/training_memory.py                # five minutes

Two layers of 16 heads of GPT-OSS's kind (sinks), of Gemma 2's (soft-caps) and of Gemma 3's (one of
the two has a sliding window), one piece, with checkpoints, float32: the most memory that the
process had, above what it had before the step. Each measurement is a process of its own; seconds
are of the step after that.
"""

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import time
from typing import Any
from unittest import mock

import record
import torch
import transformers

from longrope.train.loss import chunked_loss

SHAPE = {"vocab_size": 1536, "hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 4}
SHAPE |= {"sliding_window": 128, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
KINDS = {
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SHAPE, **ROPE, num_local_experts=2, num_experts_per_tok=1
    ),
    "gemma2": lambda: transformers.Gemma2Config(**SHAPE, query_pre_attn_scalar=64),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SHAPE, query_pre_attn_scalar=64, layer_types=["sliding_attention", "full_attention"]
    ),
}
LENGTHS = {"gpt_oss": (2048, 4096), "gemma2": (2048, 4096), "gemma3": (4096, 16_384)}


def step(kind: str, tokens: int, ours: bool) -> dict[str, float]:
    """Bytes at most above those before one step, and the seconds of another."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(KINDS[kind]()).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 1500, (1, tokens))
    theirs = mock.patch("longrope.train.loss._SplitModel.attention", contextlib.nullcontext)
    before = most()
    with contextlib.nullcontext() if ours else theirs, chunked_loss(model):
        model(input_ids=ids)["loss"].backward()
        held, started = most() - before, time.monotonic()
        model(input_ids=ids)["loss"].backward()
    return {"bytes": held, "seconds": round(time.monotonic() - started, 2)}


def most() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # kind, tokens, whose
    asked = parser.parse_args()
    if asked.one:
        kind, tokens, whose = asked.one
        print(json.dumps(step(kind, int(tokens), whose == "ours")))
        return
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        for tokens in LENGTHS[kind]:
            row: dict[str, Any] = {"kind": kind, "tokens": tokens}
            for whose in ("transformers", "ours"):
                command = [sys.executable, __file__, "--one", kind, str(tokens), whose]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                row[whose] = json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            print(json.dumps(row), flush=True)
    print(record.write("training-memory", SHAPE, rows))


if __name__ == "__main__":
    main()
