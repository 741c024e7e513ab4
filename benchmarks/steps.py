"""The known methods in place of the second search, on a run's fine-tuned model: same training.

Perplexity at every length of the evaluation on held-out documents of the run, and passkeys, under
PI, NTK, YaRN and ``yarn-log`` taken from the fine-tuned length to the target, or no step at all
(``stay``). ``searched`` is the second search. The model is the one before its final fine-tuning;
with ``--final`` it is trained under each method first, in ``RUN-METHOD`` beside the run. All of
this is without recovery, so the figures at the short lengths are not those of the run.
An interrupted command resumes.

    python benchmarks/steps.py runs/x512 --final --methods searched,yarn,ntk,pi \
        --passkeys 20 --passkeys-up-to 131072 --dtype bfloat16
"""

import argparse
import functools
import shutil
from pathlib import Path
from typing import Any

import record
import torch

from longrope.data.prompts import passkey_prompt
from longrope.distributed import Ranks
from longrope.evaluate.perplexity import score
from longrope.evaluate.retrieval import retrieve
from longrope.files.atomic import atomic_directory
from longrope.files.stores import JsonlStore
from longrope.models.load import LoadedModel
from longrope.pipeline.extend import extend, open_run
from longrope.pipeline.plan import evaluation_lengths
from longrope.pipeline.recipe import Evaluate, load_recipe
from longrope.pipeline.run_state import Run
from longrope.rope.apply import rescaled
from longrope.rope.rescale import Rescale
from longrope.search.problem import multiplied, second_search_factors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--methods", default="pi,ntk,yarn")
    parser.add_argument("--from", type=int, default=0, dest="at_least", help="Shortest length.")
    parser.add_argument("--up-to", type=int, help="The longest length; by default the target.")
    parser.add_argument("--passkeys", type=int, default=0, help="Asked at each length.")
    parser.add_argument("--passkeys-up-to", type=int, default=16384)
    parser.add_argument("--final", action="store_true", help="Final fine-tuning under each first.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="To measure in.")
    args = parser.parse_args()
    run = open_run(load_recipe(args.run / "recipe.yaml"), args.run, Ranks())
    if args.final and ("final-finetune" not in run.plan or "stay" in args.methods):
        parser.error("--final needs a run with a final fine-tuning, and a second search's methods")
    model = functools.cache(lambda method: extended(run, method, args.final, args.dtype))
    every = evaluation_lengths(run.recipe, run.plan.original, run.plan.target)
    lengths = [n for n in every if args.at_least <= n <= (args.up_to or run.plan.target)]
    methods = args.methods.split(",")
    asked = [n for n in lengths if args.passkeys and n <= args.passkeys_up_to]
    kept = JsonlStore(args.run / "steps.jsonl")
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for cell in [
        *(("passkey", method, n) for method in methods for n in asked),
        *(("perplexity", method, n) for n in lengths for method in methods),
    ]:
        kind, method, length = cell
        trials = f" {args.passkeys}" if kind == "passkey" else ""
        how = f"{' final' if args.final else ''} {args.dtype or ''}".rstrip()
        key = f"{kind} {method} {length}{trials}{how}"
        if key not in kept:
            if kind == "passkey":
                kept[key] = passkeys(
                    run, model(method), long_factors(run, method), length, args.passkeys
                )
            else:
                kept[key] = perplexity(run, model(method), long_factors(run, method), length, every)
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
    return multiplied(start, second_search_factors(run.info, finetuned, method, target))


def extended(run: Run, method: str, final: bool, dtype: str | None) -> LoadedModel:
    """The fine-tuned model, before or after the final fine-tuning under a method's factors."""
    if not final:
        loaded = run.model_before("second-search")
    elif method == "searched":
        loaded = run.trained()
    else:
        loaded = final_run(run, method).trained()
    if dtype:
        loaded.model.to(getattr(torch, dtype))
    return loaded


def final_run(run: Run, method: str) -> Run:
    """A run like another up to fine-tuning, with a known method in place of its second search."""
    out = run.out.with_name(f"{run.out.name}-{method}")
    evaluate = Evaluate(documents=1, methods=(), lengths=(str(run.plan.original),))
    step = run.recipe.second_search.model_copy(update={"method": method})
    recipe = run.recipe.model_copy(update={"second_search": step, "evaluate": evaluate})
    if not (out / "recipe.yaml").exists():
        recipe.save(out / "recipe.yaml")
    for stage in run.plan.stages:
        if stage.name == "second-search":
            break
        if not (out / stage.name / "done.json").exists():
            with atomic_directory(out / stage.name) as directory:
                shutil.copytree(run.directory(stage.name), directory, dirs_exist_ok=True)
    extend(recipe, out)
    return open_run(recipe, out, Ranks())


def perplexity(
    run: Run, loaded: LoadedModel, rescale: Rescale, length: int, lengths: list[int]
) -> dict[str, Any]:
    target = run.plan.target
    documents = run.splits.evaluation_documents(target, run.recipe.evaluate.documents)
    with rescaled(loaded.model, rescale):
        scores = score(
            loaded.forward(),
            documents,
            length,
            bos=run.splits.bos,
            lengths=lengths,
            tokens_per_document=target,
        )
    return {"perplexity": scores.perplexity, "tokens": scores.tokens}


def passkeys(
    run: Run, loaded: LoadedModel, rescale: Rescale, length: int, trials: int
) -> dict[str, Any]:
    rows = retrieve(
        loaded.forward(),
        lambda n, depth, rng: passkey_prompt(
            loaded.tokenizer, n, depth, rng, run.recipe.evaluate.digits
        ),
        length,
        rescale,
        trials=trials,
        seed=run.recipe.seed,
    )
    return {"correct": sum(row.correct for row in rows), "trials": sum(row.trials for row in rows)}


if __name__ == "__main__":
    main()
