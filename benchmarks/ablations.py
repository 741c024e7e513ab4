"""The paper's ablations in miniature: the bundled model from 256 to 4,096 tokens, one key changed.

Tables 9 (no second search), 10 (no recovery: the column "without"), 11 (start tokens) and 12
(fine-tuned directly at the target); every row is ``longrope extend`` with one change.

    python benchmarks/ablations.py --out runs/ablations --seeds 0,1,2

Searching far on the untrained model, against its starts and on held-out documents:

    python benchmarks/ablations.py --out runs/ablations --untrained 8x,64x --seeds 0,1,2
    python benchmarks/ablations.py --out runs/ablations --untrained 512x --seeds 0,1,2 \\
        --pack --dtype bfloat16 --held-out 131072
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import record

from longrope.data.encoding import bos_tokens
from longrope.data.windows import load_documents, pack
from longrope.distributed import Ranks
from longrope.evaluate.cache import MeasurementCache
from longrope.evaluate.compare import compare_perplexity, method_entries, resolve_lengths
from longrope.evaluate.settings import PerplexityConfig
from longrope.execution import ExecutionConfig
from longrope.models.load import load_model
from longrope.pipeline.extend import extend
from longrope.pipeline.recipe import make_recipe
from longrope.search.run import SearchOptions, run_search
from longrope.search.settings import EvolutionSearchConfig

RECIPE: dict[str, Any] = {
    "target": "16x",
    "data": ["python-library"],
    "eval_data": ["python-library-held-out"],
    "search": {"algorithm": "evolution", "budget": 64},
    "finetune": {
        "precision": "float32",
        "steps": 80,
        "batch": 4,
        "micro_batch": 4,
        "learning_rate": 1.5e-3,
        "beta2": 0.95,
        "warmup": 8,
        "passkey_share": 0.4,
        "answer_share": 60 / 512,  # ten for each of its tokens at 512
        "short_share": 1,
        "gradient_checkpointing": False,
    },
    "second_search": {"algorithm": "evolution", "budget": 32, "windows": 2, "passkey_prompts": 4}
    | {"population": 12, "mutations": 4, "crossovers": 4, "parents": 8},
    "recovery": {"algorithm": "evolution", "budget": 32, "windows": 8, "population": 16}
    | {"mutations": 4, "crossovers": 4},
    "evaluate": {
        "methods": ["none"],
        "lengths": ["512", "1024"],
        "documents": 4,
        "passkey_trials": 20,
        "passkey_trials_beyond": 20,
    },
}
# The direct ones see as many tokens as the others, in pieces of eight times the length.
CHANGES: dict[str, dict[str, dict[str, Any] | int]] = {
    "as it is": {},
    "PI in place of the second search": {"second_search": {"method": "pi"}},
    "NTK in place of the second search": {"second_search": {"method": "ntk"}},
    "YaRN in place of the second search": {"second_search": {"method": "yarn"}},
    "yarn-log in place of the second search": {"second_search": {"method": "yarn-log"}},
    "second search by perplexity alone": {"second_search": {"passkey_prompts": 0}},
    "YaRN in place of the first search": {"search": {"method": "yarn"}},
    "fine-tuned at the target": {
        "finetune": {"length": "16x", "steps": 40, "batch": 1, "micro_batch": 1}
        | {"answer_share": 60 / 4096}
    }
    | {"search": {"windows": 2}},
    "by way of 384 tokens": {"finetune": {"through": "384", "through_steps": 40, "steps": 40}},
    "start tokens 4": {"start_tokens": 4},
    "start tokens 32": {"start_tokens": 32},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", help="Rows whose names contain this.")
    parser.add_argument("--untrained", help="Targets to search for on the untrained model.")
    parser.add_argument("--dtype", default="float32", help="Of the untrained model.")
    parser.add_argument("--pack", action="store_true", help="Documents joined: none has 131,072.")
    parser.add_argument(
        "--held-out", type=int, default=16384, help="Tokens of each document, or of all."
    )
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    if args.untrained:
        rows = []
        for target in args.untrained.split(","):
            rows.append(untrained(args, target, seeds))
            print(json.dumps(rows[-1]), flush=True)
        print(record.write(f"ablations-untrained-{args.untrained}", vars(args), rows))
        return
    rows = []
    print("| | 256 without | 256 | 512 | 1,024 | 4,096 | passkey 512 | 4,096 |")
    for name, change in CHANGES.items():
        if args.only is None or args.only in name:
            found = [run(args.out, name, change, seed) for seed in seeds]
            print(row(name, found), flush=True)
            rows += [
                {"name": name, "change": change, "seed": seed}
                | {key: results[key] for key in ("perplexity", "passkey", "recovery")}
                for seed, results in zip(seeds, found, strict=True)
            ]
    print(record.write("ablations", vars(args) | {"recipe": RECIPE}, rows))


def run(out: Path, name: str, change: dict[str, Any], seed: int) -> dict[str, Any]:
    """One extension; ``results.json`` of it."""
    content = RECIPE | {"seed": seed}
    for key, value in change.items():
        content[key] = RECIPE[key] | value if isinstance(value, dict) else value
    directory = out / f"{name.replace(' ', '-')}-{seed}"
    extend(make_recipe(content), directory)
    return json.loads((directory / "results.json").read_text())


def row(name: str, found: list[dict[str, Any]]) -> str:
    """Perplexity against the original model's at 256, as percentages; one number a seed."""
    cells = [" / ".join(_percent(r["recovery"][0]["without"], r) for r in found)]
    for length in (256, 512, 1024, 4096):
        own = [
            next(
                p["perplexity"]
                for p in r["perplexity"]
                if (p["method"], p["length"]) == ("longrope", length)
            )
            for r in found
        ]
        cells.append(" / ".join(_percent(p, r) for p, r in zip(own, found, strict=True)))
    for length in (512, 4096):
        asked = [[a for a in r["passkey"] if a["length"] == length] for r in found]
        asked = [[a for a in rows if a["method"] == "longrope"] for rows in asked]
        cells.append(" / ".join(str(sum(a["correct"] for a in rows)) for rows in asked))
    return f"| {name} | " + " | ".join(cells) + " |"


def _percent(perplexity: float, results: dict[str, Any]) -> str:
    return f"{perplexity / results['recovery'][0]['original'] - 1:+.1%}"


def untrained(args: argparse.Namespace, target: str, seeds: list[int]) -> dict[str, Any]:
    """The same search with several seeds: the loss it ends with, and what that is worth."""
    loaded = load_model("bundled", ExecutionConfig(dtype=args.dtype))
    losses, starts, files = [], [], []
    for seed in seeds:
        directory = args.out / f"untrained-{target}-{seed}"
        config = EvolutionSearchConfig(
            windows=1, budget=24, population=16, mutations=8, crossovers=8, parents=8
        )
        asked = SearchOptions(
            target,
            directory,
            data=("python-library",),
            pack=args.pack,
            start_tokens=0,
            seed=seed,
            config=config,
        )
        result = run_search(loaded, asked, Ranks())
        losses.append(result.best_loss)
        starts.append(min(result.starts.values()))
        files.append(str(directory / "rescale.json"))
    lengths, tokens = resolve_lengths(loaded.info, (target,), target)
    documents = load_documents(loaded.tokenizer, ["python-library-held-out"])
    if args.pack:
        bos, eos = bos_tokens(loaded.tokenizer), loaded.tokenizer.eos_token_id
        documents = [pack(documents, bos, eos)]
    rows = compare_perplexity(
        loaded,
        method_entries(loaded.info, ("yarn", *files), tokens),
        tokens,
        documents,
        PerplexityConfig(lengths=tuple(lengths), tokens_per_document=args.held_out),
        MeasurementCache(),
    ).rows()
    held_out = [r["perplexity"] for r in rows]
    return {
        "target": target,
        "gain of the search, nats": [round(s - x, 4) for s, x in zip(starts, losses, strict=True)],
        "held out, YaRN": round(held_out[0], 2),
        "held out, searched": [round(p, 2) for p in held_out[1:]],
        "spread": round(statistics.pstdev(held_out[1:]) / statistics.mean(held_out[1:]), 4),
    }


if __name__ == "__main__":
    main()
