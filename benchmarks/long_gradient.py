"""One gradient of a model's shape, random weights: time against its forward's, and memory.

    python benchmarks/long_gradient.py --shape smollm2 --layers 4 --tokens 4096,8192,16384
    python benchmarks/long_gradient.py --shape llama2-7b --layers 2 --tokens 4096,8192 --runs 1
    python benchmarks/long_gradient.py --shape llama2-7b --layers 2 --tokens 4096,8192 --runs 1 \\
        --offload-activations /a/folder
    python benchmarks/long_gradient.py --shape llama2-7b --layers 4 --tokens 131072      # a GPU

*Priced* is what a search counts for it, in forwards by FLOPs; *predicted* the dry run's peak memory
and bytes that wait elsewhere. On a CPU the peak is that of memory which no file backs, sampled
every few milliseconds, less what the interpreter has. Every length is a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import long_forward
import record
import torch
import transformers

from longrope.layerwise.backward import gradient
from longrope.layerwise.forward import LongForward
from longrope.layerwise.weight_offload import offload
from longrope.models.devices import find_offload_target
from longrope.pipeline.costs import Costs
from longrope.pipeline.recipe import make_recipe
from longrope.rope.apply import rescaled
from longrope.search.cost import gradient_cost


class Peak:
    """The most memory that is held within, in bytes, beyond so many of the process before."""

    def __init__(self, device: torch.device, before: int):
        self.device, self.before, self.bytes, self._on = device, before, 0, True

    def __enter__(self) -> "Peak":
        long_forward.forget_peak(self.device)
        self._watch = threading.Thread(target=self._sample, daemon=True)
        if self.device.type == "cpu":
            self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False
        if self.device.type == "cpu":
            self._watch.join()
        else:
            self.bytes = long_forward.peak(self.device)

    def _sample(self) -> None:
        while self._on:
            self.bytes = max(self.bytes, held() - self.before)
            time.sleep(0.003)


def held() -> int:
    """This process's memory that no file backs, in bytes; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return int(status.read_text().split("RssAnon:")[1].split()[0]) * 1024


def measure(args: argparse.Namespace) -> dict:
    """In a child: time a forward and a gradient several times."""
    tokens, device, before = int(args.tokens), torch.device(args.device), held()
    shape = long_forward.SHAPES[args.shape]
    shape = shape | ({"num_hidden_layers": args.layers} if args.layers else {})
    config = transformers.LlamaConfig(**shape, max_position_embeddings=2048)
    torch.manual_seed(0)
    with torch.device("cpu" if args.offload_weights else device):
        torch.set_default_dtype(getattr(torch, args.dtype))
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        torch.set_default_dtype(torch.float32)
    if args.offload_weights:
        offload(model, device)
    where = find_offload_target(args.offload_activations) if args.offload_activations else None
    forward = LongForward(model, args.chunk_size or None, where, offloaded=args.offload_weights)
    info = long_forward.facts_of(config, args.dtype)
    ids = torch.randint(10, config.vocab_size, (1, tokens + 1))
    execution = {
        "offload_activations": args.offload_activations,
        "offload_weights": args.offload_weights,
        "chunk_size": forward.chunk_size,
    }
    asked = {"target": f"{tokens}", "search": {"windows": 1}, "execution": execution}
    recipe = make_recipe(asked)
    stage = Costs(info, recipe, device.type == "cpu").search("search", tokens)
    times = []
    with rescaled(model, info.rescale("yarn", tokens), always=True):
        gradient(forward, ids[:, : min(tokens, 2 * forward.chunk_size) + 1])  # kernels are found
        for _ in range(args.runs):
            long_forward.wait(device)
            started = time.perf_counter()
            loss = forward.losses(ids).mean().item()
            between = time.perf_counter()
            with Peak(device, before) as peak:
                found = gradient(forward, ids)
                long_forward.wait(device)
            times.append((between - started, time.perf_counter() - between))
    assert abs(found.loss - loss) < 1e-3 * loss, (found.loss, loss)
    seconds = [statistics.median(part) for part in zip(*times, strict=True)]
    return {
        "tokens": tokens,
        "chunk": forward.chunk_size,
        "forward_seconds": seconds[0],
        "gradient_seconds": seconds[1],
        "forwards": statistics.median(b / a for a, b in times),
        "priced": gradient_cost(info, tokens, forward.chunk_size),
        "peak_bytes": peak.bytes,
        "predicted_bytes": stage.memory,
        "waiting_bytes": stage.host + stage.disk,
    }


def child(args: argparse.Namespace, tokens: int) -> dict:
    command = [sys.executable, __file__, "--child", "--tokens", str(tokens)]
    for name in ("shape", "dtype", "device", "chunk_size", "runs", "layers"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    command += ["--offload-weights"] if args.offload_weights else []
    if args.offload_activations:
        command += ["--offload-activations", args.offload_activations]
    # glibc must give back what is freed, or the peak is that of its heap.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | allocator
    )
    if done.returncode:
        raise SystemExit(f"{tokens} tokens: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=long_forward.SHAPES, default="smollm2")
    parser.add_argument("--layers", type=int, default=0, help="Fewer than the shape has.")
    parser.add_argument("--tokens", default="4096,8192")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--chunk-size", type=int, default=0, help="0: as fits the device.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--offload-weights", action="store_true", help="Two layers on the device.")
    parser.add_argument("--offload-activations", help="cpu, or a folder.")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return
    rows = [child(args, tokens) for tokens in map(int, args.tokens.split(","))]
    print("| tokens | forward | gradient | in forwards | priced | peak | predicted | offloaded |")
    print("|---" * 8 + "|")
    for row in rows:
        print(
            f"| {row['tokens']:,} | {row['forward_seconds']:.2f} s "
            f"| {row['gradient_seconds']:.2f} s "
            f"| {row['forwards']:.2f} | {row['priced']:.2f} | {row['peak_bytes'] / 1e9:.2f} GB "
            f"| {row['predicted_bytes'] / 1e9:.2f} GB | {row['waiting_bytes'] / 1e9:.2f} GB |"
        )
    kind = (f"-{args.layers}-layers" if args.layers else "") + (
        "-offload" if args.offload_weights else ""
    )
    kind += "-elsewhere" if args.offload_activations else ""
    print(record.write(f"long-gradient-{args.shape}{kind}", vars(args), rows))


if __name__ == "__main__":
    main()
