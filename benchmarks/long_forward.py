"""One long forward of a model's shape, random weights: time against the kernels', and memory.

    python benchmarks/long_forward.py --shape smollm2 --tokens 4096,8192,16384
    python benchmarks/long_forward.py --shape llama2-7b --layers 1 --tokens 4096,8192
    python benchmarks/long_forward.py --shape llama2-7b --tokens 131072,262144,524288   # a GPU
    python benchmarks/long_forward.py --shape llama2-7b --layers 2 --tokens 2097152
    python benchmarks/long_forward.py --shape llama2-70b --layers 4 --tokens 131072 \\
        --offload-weights                                                               # a GPU

*Floor*: the same matrix products and attention as bare calls of torch, each measured alone right
before the forward, at the best rate that torch offers (of one causal call of the whole sequence,
if it is one of seconds, and of calls chunk by chunk). *Predicted* is the dry run's peak. Every
length is a process of its own, and on a CPU the memory another.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import record
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from longrope.layerwise.forward import LongForward
from longrope.layerwise.weight_offload import offload
from longrope.models.info import ModelInfo, inspect_model
from longrope.pipeline.costs import Costs
from longrope.pipeline.recipe import make_recipe

SHAPES = {
    "bundled": {
        "vocab_size": 1536,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 3,
    },
    "smollm2": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama2-7b": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama2-70b": {
        "vocab_size": 32_000,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


def seconds_of(work: Callable[[], object], device: torch.device, least: int = 3) -> float:
    """The median of a few calls, after one; on a GPU ten short ones in a row, as in a forward."""
    times, together = [], 1
    for _ in range(least + 1):
        wait(device)
        started = time.perf_counter()
        for _ in range(together):
            work()
        wait(device)
        times.append((time.perf_counter() - started) / together)
        together = 10 if device.type == "cuda" and times[-1] < 0.01 else 1
    return statistics.median(times[1:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def products_floor(forward: LongForward, tokens: int) -> float:
    """Seconds of all products with weights, each shape measured alone on a chunk's rows."""
    model, chunk = forward.model, forward.chunk_size
    weight = next(model.parameters())
    shapes = Counter(tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear))
    total = 0.0
    for (out, into), count in shapes.items():
        # The head's, as the loss is made.
        rows = min(chunk, forward.head_rows) if out == model.config.vocab_size else chunk
        matrix = torch.randn(out, into, dtype=weight.dtype, device=forward.device)
        x = torch.randn(rows, into, dtype=weight.dtype, device=forward.device)
        one = seconds_of(lambda x=x, matrix=matrix: F.linear(x, matrix), forward.device)
        total += one * count * tokens / rows
    return total


@torch.inference_mode()
def attention_floor(forward: LongForward, tokens: int) -> tuple[float, str]:
    """Seconds of one causal attention a layer, at the best of what torch offers."""
    config, device, chunk = forward.model.config, forward.device, min(forward.chunk_size, tokens)
    dim = config.hidden_size // config.num_attention_heads
    shape = (1, config.num_attention_heads, tokens, dim)
    query = torch.randn(shape, dtype=forward.model.dtype, device=device)
    queries = query[:, :, :chunk].contiguous()
    # A chunk against all keys, without a mask: twice the pairs that a causal one needs.
    against = seconds_of(lambda: F.scaled_dot_product_attention(queries, query, query), device, 1)
    ways = {"by chunks": against * tokens / chunk / 2}
    if device.type == "cpu" or ways["by chunks"] < 2:
        ways["one causal call"] = seconds_of(
            lambda: F.scaled_dot_product_attention(query, query, query, is_causal=True), device, 1
        )
    best = min(ways, key=lambda name: ways[name])
    return config.num_hidden_layers * ways[best], best


def measure(args: argparse.Namespace) -> dict:
    """In a child: the floor and the forward, a few times, or the memory; on a GPU all."""
    tokens, device = int(args.tokens), torch.device(args.device)
    shape = SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})
    config = transformers.LlamaConfig(**shape, max_position_embeddings=tokens)
    # All layers of a large model are more than a GPU that they are offloaded from has.
    with torch.device("cpu" if args.offload_weights and not args.layers else device):
        torch.set_default_dtype(getattr(torch, args.dtype))
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        torch.set_default_dtype(torch.float32)
    if args.offload_weights:
        offload(model.to("cpu"), device)
    forward = LongForward(model, args.chunk_size or None, offloaded=args.offload_weights)
    ids = torch.randint(10, config.vocab_size, (1, tokens + 1))
    if args.memory:
        forget_peak(device)
        forward.losses(ids)
        return {"peak_bytes": peak(device)}
    forward.losses(ids[:, : 2 * forward.chunk_size + 1])  # kernels are found, and most are planned
    floors, times = [], []
    for _ in range(args.runs):
        products = products_floor(forward, tokens)
        attention, way = attention_floor(forward, tokens)
        floors.append((products, attention))
        forget_peak(device)
        wait(device)
        started = time.perf_counter()
        forward.losses(ids)
        wait(device)
        times.append(time.perf_counter() - started)
    products, attention = (statistics.median(part) for part in zip(*floors, strict=True))
    shares = [(p + a) / t for (p, a), t in zip(floors, times, strict=True)]
    here = {"peak_bytes": peak(device)} if device.type == "cuda" else {}
    return here | {
        "tokens": tokens,
        "chunk": forward.chunk_size,
        "seconds": statistics.median(times),
        "products_seconds": products,
        "attention_seconds": attention,
        "attention_way": way,
        "share_of_floor": statistics.median(shares),
        "predicted_bytes": predicted(args, config),
        "bytes_per_token": forward.bytes_per_token(),
    }


def predicted(args: argparse.Namespace, config: transformers.LlamaConfig) -> int:
    """Peak memory as ``longrope plan`` has it."""
    info = facts_of(config, args.dtype)
    execution = {"offload_weights": args.offload_weights, "chunk_size": args.chunk_size or None}
    asked = {"target": f"{args.tokens}", "execution": execution}
    costs = Costs(info, make_recipe(asked), args.device == "cpu")
    return costs.forwards("", "", int(args.tokens), 1).memory


def facts_of(config: transformers.LlamaConfig, dtype: str) -> ModelInfo:
    """Of a model that is on no disk."""
    with tempfile.TemporaryDirectory() as folder:
        config.architectures, config.dtype = ["LlamaForCausalLM"], dtype
        config.save_pretrained(folder)
        return inspect_model(folder)


def forget_peak(device: torch.device) -> None:
    """That of making the model, which may be larger than a short forward's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    if device.type == "cuda":
        # With what waits for kernels to be freed: offloaded layers do.
        return torch.cuda.memory_stats()["active_bytes.all.peak"]
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def child(args: argparse.Namespace, tokens: int, *more: str) -> dict:
    command = [sys.executable, __file__, "--child", "--tokens", str(tokens), *more]
    for name in ("shape", "dtype", "device", "chunk_size", "runs", "layers"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    command += ["--offload-weights"] if args.offload_weights else []
    # glibc must give back what is freed, or the peak is that of its heap.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    env = os.environ | (allocator if "--memory" in more else {})
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(f"{tokens} tokens: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--layers", type=int, default=0, help="Fewer than the shape has.")
    parser.add_argument("--tokens", default="4096,8192,16384")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--chunk-size", type=int, default=0, help="0: as fits the device.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--offload-weights", action="store_true", help="Two layers on the device.")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return
    rows = []
    for tokens in map(int, args.tokens.split(",")):
        row = child(args, tokens)
        rows.append(row if "peak_bytes" in row else row | child(args, tokens, "--memory"))
    print(
        "| tokens | products | attention | forward | share of the floor's rate | peak | predicted |"
    )
    print("|---" * 7 + "|")
    for row in rows:
        print(
            f"| {row['tokens']:,} | {row['products_seconds']:.2f} s "
            f"| {row['attention_seconds']:.2f} s ({row['attention_way']}) | {row['seconds']:.2f} s "
            f"| {row['share_of_floor']:.0%} | {row['peak_bytes'] / 1e9:.2f} GB "
            f"| {row['predicted_bytes'] / 1e9:.2f} GB |"
        )
    for a, b in itertools.pairwise(rows):
        slope = (b["peak_bytes"] - a["peak_bytes"]) / (b["tokens"] - a["tokens"])
        print(
            f"bytes a token, {a['tokens']:,} to {b['tokens']:,}: {a['bytes_per_token']:,} "
            f"predicted, {slope:,.0f} measured"
        )
    kind = (f"-{args.layers}-layers" if args.layers else "") + (
        "-offload" if args.offload_weights else ""
    )
    print(record.write(f"long-forward-{args.shape}{kind}", vars(args), rows))


if __name__ == "__main__":
    main()
