"""Compare the efforts of `longrope extend` on two small models: training FLOPs and perplexity.

    python benchmarks/texts.py --out texts
    python benchmarks/micro_model.py --texts texts --out micro
    python benchmarks/effort.py --micro micro --texts texts --target 16x --out runs/effort

Each row is one run. The paper's run has the paper's training; its second search stops at 64
evaluations, and its recovery is the gradient search, because Algorithm 1's take an hour here.
`paper-rate` trains the paper's steps and batch at the learning rate of `standard`: the paper's
2e-5 is for 7B. All runs train and evaluate on the same documents.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import record

from longrope.distributed import Ranks
from longrope.labels import RESULT
from longrope.pipeline.extend import extend, open_run
from longrope.pipeline.recipe import make_recipe

# The searches of the paper's rows, so that a comparison of the training takes minutes.
SHORTER: dict[str, Any] = {
    "second_search": {"algorithm": "evolution", "budget": 64, "windows": 2},
    "recovery": {"budget": 27, "windows": 12},
}
# Changes the time of a step and nothing else. The FLOPs are counted without it.
FASTER: dict[str, Any] = {"micro_batch": 16, "gradient_checkpointing": False}
ARMS: dict[str, dict[str, Any]] = {
    "quick": {"effort": "quick"},
    "standard": {"effort": "standard"},
    "paper": {"effort": "paper", "finetune": {}} | SHORTER,
    "paper-rate": {"effort": "paper", "finetune": {"learning_rate": 7e-4}} | SHORTER,
}
EVALUATE = {"methods": ["none", "yarn"], "documents": 4, "passkey_trials": 10}
HELD_OUT = ("austen-persuasion", "austen-northangerabbey")


def data_of(name: str, texts: Path) -> dict[str, Any]:
    """Return the training and evaluation text of a model."""
    if name == "bundled":
        return {"data": ["python-library"], "eval_data": ["python-library-held-out"]}
    held_out = [str(texts / f"{title}.txt") for title in HELD_OUT]
    training = sorted(str(p) for p in texts.glob("*.txt") if str(p) not in held_out)
    training = [path for path in training if "milton" not in path]
    return {
        "data": training,
        "eval_data": held_out,
        "other_data": [str(texts / "milton.txt")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--micro", required=True, help="Directory of micro_model.py.")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--target", default="16x")
    parser.add_argument("--models", default="bundled,micro")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--set", default="{}", help="More keys of every recipe, as JSON.")
    parser.add_argument("--name", default="effort")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for model in args.models.split(","):
        source = "bundled" if model == "bundled" else args.micro
        for arm in args.arms.split(","):
            for seed in args.seeds.split(","):
                content = {"model": source, "target": args.target, "evaluate": EVALUATE}
                content |= {"seed": seed} | data_of(model, args.texts) | ARMS[arm]
                content |= json.loads(args.set)
                rows.append(run(model, arm, content, args.out / f"{model}-{arm}-{seed}"))
                print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    print(record.write(args.name, vars(args), rows))


def run(model: str, arm: str, content: dict[str, Any], out: Path) -> dict[str, Any]:
    """Extend a model, and return what its training cost and what it reached."""
    started = time.monotonic()
    planned = open_run(make_recipe(content), out.with_suffix(".plan"), Ranks()).plan
    faster = {"finetune": content["finetune"] | FASTER} if "finetune" in content else {}
    extend(make_recipe(content | faster), out)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    training = [stage for stage in planned.stages if stage.kind == "finetune"]
    own = {r["length"]: r["perplexity"] for r in results["perplexity"] if r["method"] == RESULT}
    asked = [r for r in results["passkey"] if r["method"] == RESULT]
    return {
        "model": model,
        "arm": arm,
        "seed": content["seed"],
        "flops": sum(stage.linear + stage.attention for stage in training),
        "training_tokens": sum(stage.tokens for stage in training),
        "training_seconds": sum(
            s["seconds"] for s in results["stages"] if s["name"].endswith("finetune")
        ),
        "seconds": round(time.monotonic() - started),
        "perplexity": own,
        "original": next(r["perplexity"] for r in results["perplexity"] if r["method"] == "none"),
        "passkey": [sum(r["correct"] for r in asked), sum(r["trials"] for r in asked)],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lengths = sorted({length for row in rows for length in row["perplexity"]})
    header = ["model", "effort", "training FLOPs", *(f"{n:,}" for n in lengths), "passkeys"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [row["model"], row["arm"], f"{row['flops']:.2g}"]
        cells += [f"{row['perplexity'][length]:.2f}" for length in lengths]
        lines.append("| " + " | ".join([*cells, "{}/{}".format(*row["passkey"])]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
