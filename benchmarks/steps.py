"""The known methods in place of the second search, on a run's fine-tuned model: same training.

That is the model before it is settled, where a recipe does that; ``searched`` are the second
search's own.

Perplexity at every length of the evaluation on the run's held-out documents, and pass keys,
under PI, NTK, YaRN and ``yarn-log`` taken from the fine-tuned length to the target, or no step at
all (``stay``). Interrupted, it goes on; it may run beside the run's own evaluation.

    longrope extend --recipe bundled-512x --out runs/x512
    python benchmarks/steps.py runs/x512 --passkeys 20 --passkeys-up-to 16384
"""

import argparse
from pathlib import Path
from typing import Any

import record

from longrope.evaluate.perplexity import score
from longrope.evaluate.retrieval import passkey_prompt, retrieve
from longrope.extend import open_run
from longrope.files import Kept
from longrope.forward import LongForward
from longrope.parallel import Ranks
from longrope.plan import evaluation_lengths
from longrope.recipe import load_recipe
from longrope.rope.install import installed
from longrope.rope.rescale import Rescale
from longrope.search.problem import multiplied, step_factors
from longrope.workspace import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--methods", default="pi,ntk,yarn")
    parser.add_argument("--up-to", type=int, help="The longest length; by default the target.")
    parser.add_argument("--passkeys", type=int, default=0, help="Asked at each length.")
    parser.add_argument("--passkeys-up-to", type=int, default=16384)
    args = parser.parse_args()
    run = open_run(load_recipe(args.run / "recipe.yaml"), args.run, Ranks())
    lengths = evaluation_lengths(run.recipe, run.plan.original, run.plan.target)
    lengths = [n for n in lengths if n <= (args.up_to or run.plan.target)]
    methods = args.methods.split(",")
    asked = [n for n in lengths if args.passkeys and n <= args.passkeys_up_to]
    kept = Kept(args.run / "steps.jsonl")
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for cell in [
        *(("passkey", method, n) for method in methods for n in asked),
        *(("perplexity", method, n) for n in lengths for method in methods),
    ]:
        kind, method, length = cell
        trials = f" {args.passkeys}" if kind == "passkey" else ""
        key = f"{kind} {method} {length}{trials}"
        if key not in kept:
            if kind == "passkey":
                kept[key] = passkeys(run, method, length, args.passkeys)
            else:
                kept[key] = perplexity(run, method, length, lengths)
        found[cell] = kept[key]
    print("| perplexity | " + " | ".join(f"{n:,}" for n in lengths) + " |")
    for method in methods:
        row = [f"{found['perplexity', method, n]['perplexity']:.2f}" for n in lengths]
        print(f"| {method} | " + " | ".join(row) + " |")
    for method in methods:
        row = [f"{found['passkey', method, n]['correct']}" for n in asked]
        print(f"| {method}, keys of {args.passkeys} | " + " | ".join(row) + " |")
    rows = [
        {"kind": kind, "method": method, "length": length} | values
        for (kind, method, length), values in found.items()
    ]
    config = vars(args) | {"recipe": run.recipe.model_dump(mode="json")}
    print(record.write(f"steps-{args.run.name}", config, rows))


def long_factors(run: Run, method: str) -> Rescale:
    """A method's factors for the target on top of the fine-tuned ones, the run's attention."""
    finetuned, target = run.rescale("search"), run.plan.target
    start = finetuned.replace(
        max_position_embeddings=target, attention_factor=run.attention_factor(target)
    )
    if method == "stay":
        return start
    if method == "searched":
        return run.rescale("second-search")
    return multiplied(start, step_factors(run.facts, finetuned, method, target))


def perplexity(run: Run, method: str, length: int, lengths: list[int]) -> dict[str, Any]:
    loaded, target = run.model_before("second-search"), run.plan.target
    documents = run.pools.evaluation_documents(target, run.recipe.evaluate.documents)
    with installed(loaded.model, long_factors(run, method)):
        scores = score(
            LongForward(loaded.model, run.recipe.chunk),
            documents,
            length,
            bos=run.pools.bos,
            lengths=lengths,
            tokens_per_document=target,
        )
    return {"perplexity": scores.perplexity, "tokens": scores.tokens}


def passkeys(run: Run, method: str, length: int, trials: int) -> dict[str, Any]:
    loaded = run.model_before("second-search")
    rows = retrieve(
        LongForward(loaded.model, run.recipe.chunk),
        lambda n, depth, rng: passkey_prompt(
            loaded.tokenizer, n, depth, rng, run.recipe.evaluate.digits
        ),
        length,
        long_factors(run, method),
        trials=trials,
        seed=run.recipe.seed,
    )
    return {"correct": sum(row.correct for row in rows), "trials": sum(row.trials for row in rows)}


if __name__ == "__main__":
    main()
