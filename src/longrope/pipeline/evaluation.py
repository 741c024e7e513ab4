"""What an extension is worth: every method at every length, retrieval, and the short context.

Each cell is a synced line in ``cells.jsonl`` as it is measured, so that an interrupted
evaluation goes on; ``results.json`` has them in the form that other programs read. Several
processes measure different cells.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from longrope.data.prompts import (
    Prompt,
    haystack_lines,
    needle_prompt,
    passkey_prompt,
    question_tokens,
)
from longrope.evaluate.benchmarks import RULER_TOKENS, BenchmarkOptions, ask_benchmark
from longrope.evaluate.perplexity import score
from longrope.evaluate.retrieval import retrieve
from longrope.evaluate.statistics import finite_or_none
from longrope.files import JsonlStore, write_atomically
from longrope.labels import RESULT, WITHOUT
from longrope.layerwise.forward import LongForward
from longrope.models.load import LoadedModel
from longrope.pipeline.costs import Stage
from longrope.pipeline.plan import evaluation_lengths
from longrope.pipeline.results import Cell, run_results
from longrope.pipeline.run_state import Run
from longrope.progress import progress
from longrope.rope.apply import rescaled
from longrope.rope.rescale import Rescale

# Measured on the extended model.
_EXTENDED = (RESULT, WITHOUT)

# A rescale for a length; the model is the original one, or the extended one.
Chosen = Callable[[int], Rescale]


def evaluate_run(run: Run, stage: Stage) -> dict[str, Any]:
    """Measure what is not measured yet, and write ``results.json``."""
    plan, recipe = run.plan, run.recipe
    lengths = evaluation_lengths(recipe, plan.original, plan.target)
    ranks, file = run.ranks, run.directory(stage.name) / "cells.jsonl"
    cells = JsonlStore(file, rank=ranks.rank)
    shortest = question_tokens(run.tokenizer, recipe.evaluate.digits)
    wanted = list(_wanted(run, lengths, shortest))
    missing = ranks.broadcast([i for i, cell in enumerate(wanted) if cell.key not in cells])
    # By model; then the longest first, so that processes end together, or alone the shortest.
    order = -1 if ranks.group_count > 1 else 1
    missing.sort(key=lambda i: (wanted[i].method in _EXTENDED, order * wanted[i].length, i))
    mine = [wanted[i] for i in missing[ranks.group_index :: ranks.group_count]]
    with progress("evaluate", len(mine), show=ranks.first) as advance:
        for number, cell in enumerate(mine, 1):
            loaded = run.trained() if cell.method in _EXTENDED else run.original()
            measure = _MEASURES[cell.kind]
            found = measure(run, loaded, _chosen(run, cell.method), cell)
            if ranks.group.rank == 0:
                cells[cell.key] = found
            del loaded  # one model in memory at a time
            advance(number, f"{cell.kind}, {cell.method} at {cell.length:,}")
    ranks.gather(0.0)  # all is on disk
    if ranks.first:
        cells = JsonlStore(file)
        results = run_results(run, [(cell, cells[cell.key]) for cell in wanted])
        write_atomically(run.out / "results.json", json.dumps(results, indent=1) + "\n")
    return {}


def benchmark_options(run: Run) -> BenchmarkOptions:
    """What the recipe asks of lm-eval; RULER at the lengths of the evaluation that hold it."""
    section = run.recipe.evaluate
    lengths = evaluation_lengths(run.recipe, run.plan.original, run.plan.target)
    return BenchmarkOptions(
        section.benchmarks,
        section.benchmark_questions,
        section.benchmark_shots,
        section.benchmark_data,
        tuple(str(length) for length in lengths if length >= RULER_TOKENS),
        run.recipe.chunk,
        run.recipe.offload_activations,
    )


def _wanted(run: Run, lengths: list[int], shortest: int) -> Iterator[Cell]:
    """Every cell: the original model's first, so that each model is loaded once.

    Nothing is asked at lengths below ``shortest``, which do not hold the question. The
    unscaled model is measured where recovery is judged against it, also unasked.
    """
    recipe, plan = run.recipe, run.plan
    section = recipe.evaluate
    scored = {"documents": section.documents, "lengths": lengths}
    trained = plan.trained or plan.target

    def asked(trials: int) -> dict[str, Any]:
        return {"trials": trials, "digits": section.digits, "seed": recipe.seed}

    short = [length for length in lengths if length <= run.pair.recovery_length]
    for method in dict.fromkeys(("none", *section.methods, RESULT)):
        asked_for = method in (*section.methods, RESULT)
        for length in lengths if asked_for else short:
            yield Cell("perplexity", method, length, scored)
        for length in lengths:
            if length < shortest or not asked_for:
                continue
            trials = section.passkey_trials_others
            if method == RESULT:
                far = section.passkey_trials_beyond
                trials = section.passkey_trials if length <= trained else far
            if trials:
                yield Cell("passkey", method, length, asked(trials))
            if method == RESULT and section.needle_trials:
                yield Cell("needle", method, length, asked(section.needle_trials))
        if method in ("none", RESULT):
            yield from _benchmarks(run, method)
    if "recovery" in plan:
        for length in short:
            yield Cell("perplexity", WITHOUT, length, scored)
        yield from _benchmarks(run, WITHOUT)


def _benchmarks(run: Run, method: str) -> Iterator[Cell]:
    asked = benchmark_options(run)
    longest = run.plan.original if method == "none" else run.plan.target
    for task in asked.tasks:
        yield Cell("benchmark", method, longest, asked.asked() | {"task": task})


def _chosen(run: Run, method: str) -> Chosen:
    if method == RESULT:
        return run.pair.choose
    if method == WITHOUT:
        long = run.long
        return lambda length: long
    return lambda length: run.info.rescale(method, run.plan.target, length)


def _forward(run: Run, loaded: LoadedModel) -> LongForward:
    return loaded.forward(run.recipe.chunk, run.recipe.offload_activations)


def _perplexity(run: Run, loaded: LoadedModel, choose: Chosen, cell: Cell) -> dict[str, Any]:
    documents = run.splits.evaluation_documents(run.plan.target, cell.options["documents"])
    with rescaled(loaded.model, choose(cell.length)):
        scores = score(
            _forward(run, loaded),
            documents,
            cell.length,
            bos=run.splits.bos,
            lengths=cell.options["lengths"],
            tokens_per_document=run.plan.target,
        )
    return {
        "perplexity": finite_or_none(scores.perplexity),
        "standard_error": scores.standard_error,
        "tokens": scores.tokens,
    }


def _passkey(run: Run, loaded: LoadedModel, choose: Chosen, cell: Cell) -> dict[str, Any]:
    def make(length: int, depth: float, rng: Any) -> Prompt:
        return passkey_prompt(loaded.tokenizer, length, depth, rng, cell.options["digits"])

    return _asked(run, loaded, make, choose, cell)


def _needle(run: Run, loaded: LoadedModel, choose: Chosen, cell: Cell) -> dict[str, Any]:
    lines = haystack_lines(run.splits.evaluation, loaded.tokenizer)

    def make(length: int, depth: float, rng: Any) -> Prompt:
        return needle_prompt(loaded.tokenizer, lines, length, depth, rng, cell.options["digits"])

    return _asked(run, loaded, make, choose, cell)


def _asked(
    run: Run,
    loaded: LoadedModel,
    make: Callable[[int, float, Any], Prompt],
    choose: Chosen,
    cell: Cell,
) -> dict[str, Any]:
    rows = retrieve(
        _forward(run, loaded),
        make,
        cell.length,
        choose(cell.length),
        trials=cell.options["trials"],
        seed=cell.options["seed"],
        answered=_parts(run, cell),
    )
    return {"rows": [[row.depth, row.correct, row.trials] for row in rows]}


def _benchmark(run: Run, loaded: LoadedModel, choose: Chosen, cell: Cell) -> dict[str, Any]:
    task, asked = cell.options["task"], benchmark_options(run)
    scores = ask_benchmark(loaded, choose, cell.length, task, asked, _parts(run, cell))
    return {"scores": scores}


def _parts(run: Run, cell: Cell) -> JsonlStore:
    """What is answered of a cell that takes hours, kept as it is."""
    return JsonlStore(run.directory("evaluate") / "parts.jsonl", cell.key, run.ranks.rank)


_MEASURES = {
    "perplexity": _perplexity,
    "passkey": _passkey,
    "needle": _needle,
    "benchmark": _benchmark,
}
