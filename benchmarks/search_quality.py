"""Both searches on the same windows: the loss that each reaches, against forwards of all windows.

    python benchmarks/search_quality.py --data python-library --out runs/quality
    python benchmarks/search_quality.py --data python-library --target 64x --windows 2 --seeds 0 \\
        --budgets 27 --paper-budget 200 --out runs/quality-64x

The windows are those of seed 0, so the seeds differ in the candidates alone. Interrupted, it goes
on; under ``torchrun --nproc-per-node N`` the processes share Algorithm 1's candidates. Held out:
the first window of each document that was not searched on (of python-library, packages that the
bundled model has not seen), differences paired.
"""

import argparse
import hashlib
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import record
from smollm2 import model_path

from longrope.data.documents import check_sources
from longrope.data.encoding import bos_tokens
from longrope.data.windows import (
    Windows,
    exclude_documents,
    load_documents,
    search_windows,
    with_bos,
)
from longrope.distributed import Ranks, ranks
from longrope.execution import ExecutionConfig
from longrope.files.atomic import write_atomically
from longrope.files.stores import read_lines
from longrope.models.load import LoadedModel, load_model
from longrope.models.target_length import parse_extension
from longrope.rope.apply import rescaled
from longrope.rope.rescale import Rescale
from longrope.search.problem import first_search_problem
from longrope.search.run import search_stage
from longrope.search.settings import make_search_config

PAPER, FAST = "#7f8c8d", "#c0392b"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--target", default="8x")
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--budgets", default="7,14,27,54,108", help="Of the fast search.")
    parser.add_argument("--paper-budget", type=int, default=1344)
    parser.add_argument("--paper-seeds", help="Of Algorithm 1, where not the same.")
    parser.add_argument("--chunk", type=int, help="Tokens through a layer at a time.")
    parser.add_argument("--held-out", type=int, default=12, help="Documents at most.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="search-quality", help="Of the result's file.")
    args = parser.parse_args()
    check_sources(args.data)
    with ranks() as these:
        config, rows = searched(args, these)
    if these.first:
        print(record.write(args.name, config, rows))
        if any(row["algorithm"] == "evolution" for row in rows):  # what the others are set against
            table(rows)
            draw(rows, args.out / "search-quality.png")


def searched(args: argparse.Namespace, these: Ranks) -> tuple[dict, list[dict[str, Any]]]:
    """What was asked, and a row for every search; the first process alone measures held out."""
    execution = ExecutionConfig(dtype=args.dtype, chunk_size=args.chunk)
    loaded = load_model(model_path(args.model), execution)
    length, bos = parse_extension(args.target, loaded.info), bos_tokens(loaded.tokenizer)
    documents = load_documents(loaded.tokenizer, args.data)
    windows = search_windows(documents, length, args.windows, 0, bos)
    held_out = unseen_windows(loaded, args.data, documents, windows, length, args.held_out)
    problem, rows = first_search_problem(loaded.info, length), []
    runs = [("evolution", args.paper_budget)] + [
        ("gradient", int(b)) for b in args.budgets.split(",")
    ]
    for seed, (algorithm, budget) in itertools.product(args.seeds.split(","), runs):
        if algorithm == "evolution" and seed not in (args.paper_seeds or args.seeds).split(","):
            continue
        directory = args.out / f"{algorithm}-{budget}-{seed}"
        result = search_stage(
            loaded,
            problem,
            windows,
            make_search_config({"algorithm": algorithm, "budget": budget}),
            directory,
            these,
            seed=int(seed),
            title=directory.name,
        )
        row = {
            "algorithm": algorithm,
            "budget": budget,
            "seed": int(seed),
            "forwards": result.forwards,
            "loss": result.best_loss,
            "portable_loss": result.portable_loss,
            "start_tokens": result.best.start_tokens,
        }
        if these.first:
            row |= {"curve": curve(directory)} | held_out_losses(loaded, directory, held_out)
        rows.append(row)
    config = {k: v for k, v in vars(args).items() if k not in ("out", "name")}
    config |= {"windows": [d.name for d in windows.documents], "held_out_windows": len(held_out)}
    return config, rows


def unseen_windows(
    loaded: LoadedModel, data: list[str], documents: list, windows: Windows, length: int, most: int
) -> np.ndarray:
    """A window of each held-out document, shape (documents, tokens)."""
    searched = [h for document in windows.documents for h in document.sha256]
    others = (
        load_documents(loaded.tokenizer, ["python-library-held-out"])
        if data == ["python-library"]
        else exclude_documents(documents, searched)
    )
    bos = bos_tokens(loaded.tokenizer)
    rows = [with_bos(d.ids[:length], bos) for d in others if len(d) >= length]
    return np.stack(rows[:most])


def curve(directory: Path) -> list[tuple[float, float]]:
    """Forwards spent, and the least loss on all windows so far, where it changes."""
    spent, best, points = 0.0, math.inf, []
    for line in read_lines(directory / "history.jsonl"):
        spent += line["forwards"]
        if "window" not in line and line["loss"] is not None and line["loss"] < best:
            best = line["loss"]
            points.append((round(spent, 2), best))
    return points


def held_out_losses(loaded: LoadedModel, directory: Path, windows: np.ndarray) -> dict[str, Any]:
    """Mean loss of each held-out window under the best and the portable rescale; kept."""
    kept = directory / f"held-out-{hashlib.sha256(windows.tobytes()).hexdigest()[:8]}.json"
    if not kept.exists():
        forward = loaded.forward()

        def measured(rescale: Rescale) -> list[float]:
            with rescaled(loaded.model, rescale):
                losses = [batch.mean(dim=1) for batch in forward.batches(windows)]
            return [x for batch in losses for x in batch.tolist()]

        best, portable = (Rescale.load(directory / f"{n}.json") for n in ("rescale", "portable"))
        found = {"held_out_rescale": measured(best)}
        same = portable == best
        found["held_out_portable"] = found["held_out_rescale"] if same else measured(portable)
        write_atomically(kept, json.dumps(found))
    return json.loads(kept.read_text())


def table(rows: list[dict[str, Any]]) -> None:
    """Medians over seeds, and the paired difference on held-out documents from Algorithm 1."""
    paper = [r["held_out_rescale"] for r in rows if r["algorithm"] == "evolution"]
    print(
        "| search | forwards | loss, median | least – most | n̂ = 0 | held out less Algorithm 1's |"
    )
    print("|---|---|---|---|---|---|")
    for key in dict.fromkeys((r["algorithm"], r["budget"]) for r in rows):
        these = [r for r in rows if (r["algorithm"], r["budget"]) == key]
        losses = [r["loss"] for r in these]
        portable = [r["portable_loss"] for r in these]
        # Every seed of one against every seed of the other, document by document.
        pairs = np.array([np.subtract(r["held_out_rescale"], p) for r in these for p in paper])
        by_document = pairs.mean(axis=0)
        error = by_document.std(ddof=1) / math.sqrt(len(by_document))
        print(
            f"| {key[0]} | {statistics.median(r['forwards'] for r in these):.1f} "
            f"| {statistics.median(losses):.4f} | {min(losses):.4f} – {max(losses):.4f} "
            f"| {statistics.median(portable):.4f} | {by_document.mean():+.4f} ± {error:.4f} |"
        )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss against forwards, the seeds' median with their range shaded."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    papers = [r["curve"] for r in rows if r["algorithm"] == "evolution"]
    grid = np.unique(np.concatenate([[x for x, _ in points] for points in papers]))
    stairs = np.array(
        [
            [min((y for x, y in points if x <= g), default=math.nan) for g in grid]
            for points in papers
        ]
    )
    axes.plot(grid, np.median(stairs, axis=0), color=PAPER, label="Algorithm 1")
    axes.fill_between(grid, stairs.min(axis=0), stairs.max(axis=0), color=PAPER, alpha=0.25, lw=0)
    axes.axhline(np.median(stairs[:, -1]), color=PAPER, linestyle=":", linewidth=1)
    budgets = sorted({r["budget"] for r in rows if r["algorithm"] == "gradient"})
    fast = [[r for r in rows if (r["algorithm"], r["budget"]) == ("gradient", b)] for b in budgets]
    spent = [statistics.median(r["forwards"] for r in these) for these in fast]
    losses = [[r["loss"] for r in these] for these in fast]
    axes.plot(spent, [statistics.median(x) for x in losses], "o-", color=FAST, label="gradient")
    axes.fill_between(
        spent, [min(x) for x in losses], [max(x) for x in losses], color=FAST, alpha=0.25, lw=0
    )
    middle = sorted(y for points in papers for _, y in points)
    least = min(middle[0], *(min(x) for x in losses))
    axes.set_ylim(least - 0.01, middle[int(0.9 * (len(middle) - 1))] + 0.02)
    axes.set(xscale="log", xlabel="forwards of all windows", ylabel="loss, nats per token")
    axes.set_title("The search windows' loss, seeds' median and range")
    axes.legend()
    figure.savefig(path, dpi=150)
    print(path)


if __name__ == "__main__":
    main()
