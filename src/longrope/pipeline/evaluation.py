"""The evaluation stage: perplexity, retrieval and benchmarks of an extension.

Every finished measurement is a synced line of ``evaluate/cells.jsonl``, and the parts of an
unfinished one are in ``evaluate/unfinished``, so an interrupted evaluation resumes. Ranks share
the measurements. ``results.json`` has the results in the form that other programs read.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

from longrope.data.prompts import question_tokens
from longrope.data.windows import TokenDocument
from longrope.evaluate.benchmarks import RULER_TOKENS
from longrope.evaluate.cache import MeasurementCache
from longrope.evaluate.measure import Measurement, measure
from longrope.evaluate.settings import BenchmarkConfig, PerplexityConfig, RetrievalConfig
from longrope.files.atomic import write_atomically
from longrope.files.stores import JsonlStore, finite_or_none
from longrope.labels import RESULT, WITHOUT, fine_tuned, has_extended_weights, method_of
from longrope.pipeline.costs import Stage
from longrope.pipeline.plan import evaluation_lengths
from longrope.pipeline.results import RunMeasurement, run_results
from longrope.pipeline.run_state import Run
from longrope.progress import console, progress, seconds_left
from longrope.rope.rescale import Rescale
from longrope.units import duration
from longrope.version import __version__


def evaluate_run(run: Run, stage: Stage) -> dict[str, Any]:
    """Run the evaluation stage: the measurements that are missing, then ``results.json``."""
    ranks, directory = run.ranks, run.directory(stage.name)
    file = directory / "cells.jsonl"
    results = JsonlStore(file, rank=ranks.rank)
    wanted = list(_wanted(run))
    keys = [cell.measurement.key for cell in wanted]
    missing = ranks.broadcast([i for i, key in enumerate(keys) if key not in results])
    # By model, then by length: with several ranks the longest first, so that all end together.
    order = -1 if ranks.group_count > 1 else 1
    missing.sort(
        key=lambda i: (
            has_extended_weights(wanted[i].method),
            order * wanted[i].measurement.length,
            i,
        )
    )
    if ranks.first and 0 < len(missing) < len(wanted):
        console.print(f"resuming after {len(wanted) - len(missing)} of {len(wanted)} measurements")
    mine = missing[ranks.group_index :: ranks.group_count]
    with progress("evaluate", len(mine), show=ranks.first) as advance:
        measured: list[tuple[float, float]] = []
        costs = [_cost(run, wanted[index].measurement) for index in mine]
        for number, index in enumerate(mine, 1):
            method, one = wanted[index].method, wanted[index].measurement
            started = time.monotonic()
            loaded = run.trained() if has_extended_weights(method) else run.original()
            cache = MeasurementCache(directory / "unfinished", ranks.rank)
            found = measure(loaded, one, cache)
            if ranks.group.rank == 0:
                results[keys[index]] = _result(one.kind, found)
                cache.drop()
            del loaded  # one model in memory at a time
            measured.append((costs[number - 1], time.monotonic() - started))
            left = seconds_left(measured, sum(costs[number:])) or 0.0
            note = f"{one.kind}, {method} at {one.length:,}, {duration(left)} left"
            advance(number, note)
    ranks.gather(0.0)  # every rank's results are on disk
    if ranks.first:
        results = JsonlStore(file)
        content = run_results(run, [(cell, results[cell.measurement.key]) for cell in wanted])
        write_atomically(run.out / "results.json", json.dumps(content, indent=1) + "\n")
        shutil.rmtree(directory / "unfinished", ignore_errors=True)
    return {}


def benchmark_config(run: Run) -> BenchmarkConfig:
    """Return the benchmarks of the evaluation stage; RULER runs at every length that holds it."""
    config = run.recipe.evaluate.benchmarks
    if config.ruler_lengths:
        return config
    lengths = evaluation_lengths(run.recipe, run.plan.original, run.plan.target)
    ruler = tuple(length for length in lengths if length >= RULER_TOKENS)
    return config.model_copy(update={"ruler_lengths": ruler})


def _wanted(run: Run) -> Iterator[RunMeasurement]:
    """Yield every measurement of the evaluation stage.

    Those of the original model are first, so that each model is loaded once. Retrieval skips
    lengths that do not hold the question. The unscaled model is always measured at the lengths
    where recovery is judged against it.
    """
    recipe, plan = run.recipe, run.plan
    section, trained = recipe.evaluate, plan.trained or plan.target
    lengths = evaluation_lengths(recipe, plan.original, plan.target)
    shortest = question_tokens(run.tokenizer, section.digits)
    scored = run.splits.evaluation_documents(plan.target, section.documents)
    haystack = run.splits.evaluation
    other, other_lengths = run.splits.other_document(lengths)
    models = {extended: _identity(run, extended) for extended in (False, True)}

    def cell(kind: str, method: str, length: int, options: Any) -> RunMeasurement:
        documents: tuple[TokenDocument, ...] | list[TokenDocument] = ()
        documents = {"perplexity": scored, "needle": haystack}.get(kind, documents)
        model, choose = models[has_extended_weights(method)], _choose(run, method)
        return RunMeasurement(method, Measurement(kind, model, choose, length, options, documents))

    def perplexity(method: str, length: int) -> RunMeasurement:
        options = PerplexityConfig(lengths=tuple(lengths), tokens_per_document=plan.target)
        return cell("perplexity", method, length, options)

    def perplexity_elsewhere(method: str, length: int) -> RunMeasurement:
        options = PerplexityConfig(
            lengths=tuple(other_lengths), tokens_per_document=max(other_lengths)
        )
        model, choose = models[has_extended_weights(method)], _choose(run, method)
        one = Measurement("perplexity", model, choose, length, options, other)
        return RunMeasurement(method, one, other=True)

    def retrieval(kind: str, method: str, length: int, trials: int) -> RunMeasurement:
        config = RetrievalConfig(trials=trials, digits=section.digits, seed=recipe.seed)
        return cell(kind, method, length, config)

    def benchmarks(method: str) -> Iterator[RunMeasurement]:
        longest = plan.original if method == "none" else plan.target
        config = benchmark_config(run)
        for task in config.tasks:
            single = config.model_copy(update={"tasks": (task,)})
            yield cell("benchmark", method, longest, single)

    short = [length for length in lengths if length <= run.pair.recovery_length]
    for method in dict.fromkeys(("none", *section.methods, RESULT)):
        asked_for = method in (*section.methods, RESULT)
        for length in lengths if asked_for else short:
            yield perplexity(method, length)
        for length in lengths:
            if length < shortest or not asked_for:
                continue
            trials = section.passkey_trials_others
            if method == "none" and length == plan.original:  # can it be found at all?
                trials = max(trials, section.passkey_trials)
            if method == RESULT:
                far = section.passkey_trials_beyond
                trials = section.passkey_trials if length <= trained else far
            if trials:
                yield retrieval("passkey", method, length, trials)
            if method == RESULT and section.needle_trials:
                yield retrieval("needle", method, length, section.needle_trials)
        if method in ("none", RESULT):
            yield from benchmarks(method)
    if "recovery" in plan:
        for length in short:
            yield perplexity(WITHOUT, length)
        yield from benchmarks(WITHOUT)
    if plan.trained is not None:
        for method in section.fine_tuned_methods:
            for length in lengths:
                yield perplexity(fine_tuned(method), length)
    for method in ("none", "yarn", RESULT):
        for length in other_lengths:
            if method in (*section.methods, RESULT) or length == plan.original:
                yield perplexity_elsewhere(method, length)


def _cost(run: Run, one: Measurement) -> float:
    """Return the FLOPs of a measurement; of a benchmark, those of one of its longest prompts."""
    windows = 1
    if isinstance(one.options, RetrievalConfig):
        windows = one.options.trials
    elif isinstance(one.options, PerplexityConfig):
        scored = one.options.tokens_per_document or one.length
        windows = len(one.documents) * scored // one.length
    return windows * sum(run.info.forward_flops(one.length))


def _identity(run: Run, extended: bool) -> str:
    """Return a hash of the model that a run's evaluation stage measures, without its weights."""
    if not run.ranks.first:
        return run.ranks.broadcast(None)
    recipe = run.recipe
    trained = run.plan.before("export", "finetune") if extended else None
    content = [
        __version__,
        (run.out / "model.sha256").read_text(encoding="utf-8"),
        [recipe.execution.dtype, recipe.rope_scaling, recipe.original_length],
        trained and [trained, run.record(trained)],
    ]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return run.ranks.broadcast(digest)


def _choose(run: Run, method: str) -> Callable[[int], Rescale]:
    if method == RESULT:
        return run.pair.choose
    if method == WITHOUT:
        long = run.long
        return lambda length: long
    return lambda length: run.info.rescale(method_of(method), run.plan.target, length)


def _result(kind: str, found: Any) -> dict[str, Any]:
    """Return a measurement's result as the evaluation stage stores it, in JSON."""
    if kind == "benchmark":
        return {"scores": found}
    if kind != "perplexity":
        return {"rows": [[row.depth, row.correct, row.trials] for row in found]}
    return {
        "perplexity": finite_or_none(found.perplexity),
        "standard_error": found.standard_error,
        "tokens": found.tokens,
    }
