"""The long forward against the plain transformers forward: time and peak memory, as ratios.

    python benchmarks/forward_cost.py                                    # bundled, 2,048 tokens
    python benchmarks/forward_cost.py --model smollm2 --dtype bfloat16 --tokens 16384
    python benchmarks/forward_cost.py --memory --tokens 8192,16384,32768  # predicted and measured

Every measurement is a process of its own, so that peak memory is that forward's alone; the two
forwards alternate, and what is given is the median of the ratios.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import record

KINDS = ("long", "plain")


def measure(args: argparse.Namespace) -> None:
    """In a child: one forward after a warm-up, its seconds and the peak it added."""
    import torch
    from smollm2 import model_path

    from longrope.execution import ExecutionConfig
    from longrope.models.load import load_model
    from longrope.rope.apply import rescaled

    torch.manual_seed(0)
    execution = ExecutionConfig(dtype=args.dtype, device=args.device, chunk_size=args.chunk)
    loaded = load_model(model_path(args.model), execution)
    model, info = loaded.model, loaded.info
    tokens = int(args.tokens)
    ids = torch.randint(10, info.vocabulary, (1, tokens + 1))
    forward = loaded.forward()
    cuda = forward.device.type == "cuda"

    @torch.inference_mode()
    def plain() -> float:
        device = forward.device
        logits = model(input_ids=ids[:, :-1].to(device), use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits[0].float(), ids[0, 1:].to(device), reduction="none"
        )
        return losses.double().mean().item()

    def long() -> float:
        return forward.losses(ids).double().mean().item()

    run = {"long": long, "plain": plain}[args.kind]
    with rescaled(model, info.rescale("yarn", tokens)):
        if tokens <= 4096 or cuda:
            run()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        started = time.perf_counter()
        loss = run()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if cuda:
        peak = torch.cuda.max_memory_allocated()
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    print(
        json.dumps(
            {
                "seconds": seconds,
                "loss": loss,
                "added_bytes": peak - before,
                "peak_bytes": peak,
                "slope": forward.bytes_per_token(),
                "device": name,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    )


def child(args: argparse.Namespace, kind: str, tokens: int) -> dict:
    command = [sys.executable, __file__, "--kind", kind, "--tokens", str(tokens)]
    for name in ("model", "dtype", "chunk", "device"):
        if (value := getattr(args, name)) is not None:
            command += [f"--{name}", str(value)]
    # For memory, glibc must give back what is freed, or the peak is that of its heap.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    env = os.environ | (allocator if args.memory else {})
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(f"{kind} at {tokens}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def side_by_side(args: argparse.Namespace, tokens: int) -> dict:
    runs = {kind: [] for kind in KINDS}
    for _ in range(args.runs):
        for kind in KINDS:
            runs[kind].append(child(args, kind, tokens))
    pairs = list(zip(runs["long"], runs["plain"], strict=True))
    return {
        "tokens": tokens,
        "time_ratio": statistics.median(a["seconds"] / b["seconds"] for a, b in pairs),
        "peak_memory_ratio": statistics.median(a["peak_bytes"] / b["peak_bytes"] for a, b in pairs),
        "loss_difference": max(abs(a["loss"] - b["loss"]) for a, b in pairs),
        "runs": runs,
    }


def memory(args: argparse.Namespace, sizes: list[int]) -> dict:
    """The slope of the peak between sizes, beside the slope computed beforehand."""
    found = [child(args, "long", tokens) for tokens in sizes]
    steps = zip(sizes, sizes[1:], found, found[1:], strict=False)
    slopes = [(b["peak_bytes"] - a["peak_bytes"]) / (n - m) for m, n, a, b in steps]
    return {"sizes": sizes, "predicted": found[0]["slope"], "measured": slopes, "runs": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device")
    parser.add_argument("--tokens", default="2048")
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        measure(args)
        return
    sizes = [int(n) for n in args.tokens.split(",")]
    result = [memory(args, sizes)] if args.memory else [side_by_side(args, n) for n in sizes]
    for row in result:
        print(json.dumps({key: value for key, value in row.items() if key != "runs"}))
    kind = "forward-memory" if args.memory else "forward-cost"
    print(record.write(f"{kind}-{Path(args.model).name}", vars(args), result))


if __name__ == "__main__":
    main()
