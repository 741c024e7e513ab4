"""Where the time of a forward goes, kernel by kernel: plain transformers' and the long one.

    python benchmarks/forward_profile.py --shape smollm2 --tokens 16384
    python benchmarks/forward_profile.py --shape llama2-7b --layers 2 --tokens 131072 --kinds long

Self time of torch's operators (of their kernels on a GPU), summed by what they are for; random
weights. The profiler's own cost is in the total. ``plain`` is the model's own forward with full
logits, and a cross-entropy. To profile an earlier version, put its ``src`` before in PYTHONPATH.
"""

import argparse
import time
from collections import Counter
from typing import Any

import record
import torch
import torch.nn.functional as F
import transformers
from long_forward import SHAPES, wait
from torch.profiler import ProfilerActivity, profile

from longrope.layerwise.forward import LongForward

PARTS = {  # the first whose word is in an operator's name
    "attention": ("scaled_dot_product", "flash", "fmha"),
    "products": ("aten::mm", "addmm", "bmm", "linear", "gemm", "nvjet", "cutlass"),
    "loss": ("softmax", "nll_loss", "cross_entropy"),
    "copies": ("copy", "clone", "aten::cat", "catarray", "repeat_interleave", "index_select"),
    "norms, rotation, activation, others": ("",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--layers", type=int, default=0, help="Fewer than the shape has.")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kinds", default="plain,long")
    parser.add_argument("--name", default="forward-profile", help="Of the result's file.")
    args = parser.parse_args()
    shape = SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})
    config = transformers.LlamaConfig(**shape, max_position_embeddings=args.tokens)
    torch.manual_seed(0)
    with torch.device(args.device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, args.dtype)
        ).eval()
    ids = torch.randint(10, config.vocab_size, (1, args.tokens + 1))
    rows = [profiled(kind, model, ids) for kind in args.kinds.split(",")]
    print("| forward | " + " | ".join(PARTS) + " | all |")
    print("|---" * (len(PARTS) + 2) + "|")
    for row in rows:
        parts = [f"{row['parts'].get(part, 0):.2f} s" for part in PARTS]
        print(f"| {row['kind']} | " + " | ".join(parts) + f" | {row['seconds']:.2f} s |")
    for row in rows:
        print(row["kind"], *(f"{name} {seconds:.2f} s" for name, seconds in row["most"]), sep="; ")
    print(record.write(args.name, {k: v for k, v in vars(args).items() if k != "name"}, rows))


def profiled(kind: str, model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Seconds of one forward after another, by part, and the operators that take most."""
    device, forward = model.device, LongForward(model)

    @torch.inference_mode()
    def plain(ids: torch.Tensor) -> None:
        logits = model(input_ids=ids[:, :-1].to(device), use_cache=False).logits
        F.cross_entropy(logits[0].float(), ids[0, 1:].to(device), reduction="none").cpu()

    run = {"plain": plain, "long": forward.losses}[kind]
    run(ids if device.type == "cuda" else ids[:, :257])  # a GPU plans its kernels by shape
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        started = time.perf_counter()
        run(ids)
        wait(device)
        seconds = time.perf_counter() - started
    parts, operators = Counter[str](), Counter[str]()
    for event in found.key_averages():
        spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        words = event.key.lower()
        part = next(p for p, signs in PARTS.items() if any(sign in words for sign in signs))
        parts[part] += spent
        operators[event.key] += spent
    return {
        "kind": kind,
        "seconds": seconds,
        "parts": dict(parts),
        "most": operators.most_common(8),
    }


if __name__ == "__main__":
    main()
