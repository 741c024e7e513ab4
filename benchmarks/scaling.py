"""What more processes bring, and what every stage costs at 7B and 70B: docs/scaling.md.

    python benchmarks/scaling.py processes        # searches and a shared sequence, on 1, 2, 4
    python benchmarks/scaling.py stages           # FLOPs, bytes, hours at true shape; nothing runs

The first starts torchrun with one thread a process. The second takes the rates of a device that
is given (--linear, --attention: FLOPs a second that a forward reaches there).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import long_forward
import record
import torch
import transformers

from longrope.data.encoding import bos_tokens
from longrope.data.windows import load_documents, search_windows
from longrope.distributed import Ranks, ranks
from longrope.execution import ExecutionConfig
from longrope.layerwise.backward import gradient
from longrope.models.info import inspect_model
from longrope.models.load import load_model
from longrope.pipeline.plan import make_plan
from longrope.pipeline.recipe import load_recipe, make_recipe
from longrope.rope.apply import rescaled
from longrope.search.problem import first_search_problem
from longrope.search.run import search_stage
from longrope.search.settings import EvolutionSearchConfig, GradientSearchConfig

NAMES = {"7B": "llama2-7b", "70B": "llama2-70b"}
SEARCHES = {
    "evolution": EvolutionSearchConfig(
        windows=2, population=8, mutations=4, crossovers=4, iterations=1, parents=4
    ),
    "gradient": GradientSearchConfig(windows=4, budget=27),
    "gradient, 4 windows per step": GradientSearchConfig(windows=4, budget=27, windows_per_step=4),
}


def child(args: argparse.Namespace) -> None:
    """One process of several: seconds of each kind of work, printed by the first."""
    torch.set_num_threads(1)
    found = {}
    with ranks() as these, tempfile.TemporaryDirectory() as out:
        for name, config in SEARCHES.items():
            found[name] = _search(config, these, Path(out) / name)
    if these.first:
        print(json.dumps(found), flush=True)


def _search(config: GradientSearchConfig | EvolutionSearchConfig, these: Ranks, out: Path) -> float:
    loaded = load_model("bundled", ExecutionConfig(dtype="float32", device="cpu"))
    documents = load_documents(loaded.tokenizer, ["python-library"])
    windows = search_windows(documents, 2048, config.windows, 0, bos_tokens(loaded.tokenizer))
    problem = first_search_problem(loaded.info, 2048)
    these.gather(0.0)
    started = time.perf_counter()
    search_stage(loaded, problem, windows, config, out, these)
    return time.perf_counter() - started


def shared(args: argparse.Namespace) -> None:
    """One process of a group: seconds of a forward pass of one sequence, and of its gradient."""
    torch.set_num_threads(1)
    with ranks(int(os.environ.get("WORLD_SIZE", "1"))) as these:
        execution = ExecutionConfig(dtype="float32", device="cpu", chunk_size=1024)
        loaded = load_model("bundled", execution, group=these.group)
        ids = torch.randint(3, 1536, (1, 16_385), generator=torch.Generator().manual_seed(0))
        forward, found = loaded.forward(), {}
        with rescaled(loaded.model, loaded.info.rescale("yarn", 16_384), always=True):
            work = {"one sequence of 16,384": forward.losses}
            work["its gradient"] = partial(gradient, forward)
            for name, compute in work.items():
                these.gather(0.0)
                started = time.perf_counter()
                compute(ids)
                found[name] = time.perf_counter() - started
    if these.first:
        print(json.dumps(found), flush=True)


def processes(args: argparse.Namespace) -> None:
    """The table of 1, 2 and 4 processes."""
    rows = []
    for count in (1, 2, 4):
        row: dict = {"processes": count}
        for part in ("child", "shared"):
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            command = [sys.executable, *launcher, str(count), __file__, part]
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            row |= json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
    names = [name for name in rows[0] if name != "processes"]
    print("| processes | " + " | ".join(names) + " |")
    print("|---|" + "---|" * len(names))
    for row in rows:
        cells = []
        for name in names:
            gain = rows[0][name] / row[name]
            cells.append(f"{gain:.2f}× ({gain / row['processes']:.0%})")
        print(f"| {row['processes']} | " + " | ".join(cells) + " |")
    print(record.write("scaling-processes", {"cores": os.cpu_count()}, rows))


def stages(args: argparse.Namespace) -> None:
    """The paper's recipe at every target, priced by ``ContextPlan``."""
    rows = []
    for shape, name in NAMES.items():
        with tempfile.TemporaryDirectory() as folder:
            config = transformers.LlamaConfig(
                **long_forward.SHAPES[name],
                max_position_embeddings=4096,
                dtype="bfloat16",
                architectures=["LlamaForCausalLM"],
            )
            config.save_pretrained(folder)
            info = inspect_model(folder)
            for target in ("128k", "256k", "512k", "1024k", "2048k"):
                rows += _stages(info, shape, target, folder, args)
    print("| model | target | stage | length | FLOPs | hours | GB | GB, offloaded | GB that wait |")
    print("|---" * 9 + "|")
    for row in rows:
        print(
            f"| {row['model']} | {row['target']} | {row['stage']} | {row['length']:,} "
            f"| {row['flops']:.1e} | {row['hours']:,.1f} | {row['gigabytes']:.0f} "
            f"| {row['gigabytes_offloaded']:.0f} | {row['gigabytes_waiting']:,.0f} |"
        )
    config = {"linear": args.linear, "attention": args.attention, "algorithm": args.algorithm}
    print(record.write("scaling-stages", config, rows))


def _stages(info, shape: str, target: str, folder: str, args: argparse.Namespace) -> list[dict]:
    paper = load_recipe("llama2-7b").model_dump(mode="json")
    execution = paper["execution"] | {"offload_activations": None}
    changes: dict = {"model": folder, "target": target, "execution": execution}
    if target != "2048k":  # trained at an eighth, which for the others is 128k at most
        changes["finetune"] = paper["finetune"] | {"through": None}
    if args.algorithm == "gradient":
        fast = {"algorithm": "gradient", "budget": 27}
        changes |= {name: fast for name in ("search", "second_search", "recovery")}
    plan = make_plan(info, make_recipe(paper | changes))
    offloaded = execution | {"offload_activations": "cpu", "offload_weights": True}
    less = make_plan(info, make_recipe(paper | changes | {"execution": offloaded}))
    rows = []
    for stage in plan.stages:
        if stage.linear + stage.attention == 0:
            continue
        seconds = stage.linear / args.linear + stage.attention / args.attention
        rows.append(
            {
                "model": shape,
                "target": target,
                "stage": stage.name,
                "length": stage.length,
                "forwards": stage.forwards,
                "flops": stage.linear + stage.attention,
                "attention_share": stage.attention / (stage.linear + stage.attention),
                "hours": seconds / 3600,
                "gigabytes": stage.memory / 1e9,
                "gigabytes_offloaded": less[stage.name].memory / 1e9,
                "gigabytes_waiting": less[stage.name].host / 1e9,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["processes", "stages", "child", "shared"])
    parser.add_argument("--linear", type=float, default=5e14, help="FLOPs a second of products.")
    parser.add_argument("--attention", type=float, default=3.5e14, help="And of attention.")
    parser.add_argument("--algorithm", choices=["evolution", "gradient"], default="gradient")
    args = parser.parse_args()
    {"processes": processes, "stages": stages, "child": child, "shared": shared}[args.what](args)


if __name__ == "__main__":
    main()
