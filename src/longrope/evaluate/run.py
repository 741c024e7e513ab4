"""What an extension is worth: every method at every length, retrieval, and the short context.

Each cell is a synced line in ``cells.jsonl`` as it is measured, so that an interrupted
evaluation goes on; ``results.json`` has them in the form that other programs read.
"""

import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

import longrope
from longrope.evaluate.compare import finite_or_none
from longrope.evaluate.perplexity import score
from longrope.evaluate.retrieval import (
    Prompt,
    haystack_lines,
    needle_prompt,
    passkey_prompt,
    question_tokens,
    retrieve,
)
from longrope.files import append_line, read_lines, write_atomically
from longrope.forward import LongForward
from longrope.model import LoadedModel
from longrope.plan import Stage, evaluation_lengths
from longrope.progress import progress
from longrope.rope.install import installed
from longrope.rope.rescale import Rescale
from longrope.workspace import Run

SCHEMA = 1
RESULT, WITHOUT = "longrope", "longrope without recovery"

# A rescale for a length; the model is the original one, or the extended one.
Chosen = Callable[[int], Rescale]


def evaluate_run(run: Run, stage: Stage) -> dict[str, Any]:
    """Measure what is not measured yet, and write ``results.json``."""
    plan, recipe = run.plan, run.recipe
    lengths = evaluation_lengths(recipe, plan.original, plan.target)
    cells = _Cells(run.directory(stage.name) / "cells.jsonl")
    shortest = question_tokens(run.original().tokenizer, recipe.evaluate.digits)
    wanted = list(_wanted(run, lengths, shortest))
    with progress("evaluate", len(wanted)) as advance:
        for number, (kind, method, length, options) in enumerate(wanted, 1):
            if not cells.known(kind, method, length, options):
                mine = method in (RESULT, WITHOUT)
                loaded = run.trained() if mine else run.original()
                rescale = _chosen(run, method)(length)
                found = _MEASURES[kind](run, loaded, rescale, length, options)
                cells.add(kind, method, length, options, found)
                del loaded  # one model in memory at a time
            advance(number, f"{kind}, {method} at {length:,}")
    results = _results(run, cells, wanted)
    write_atomically(run.out / "results.json", json.dumps(results, indent=1) + "\n")
    return {}


def _wanted(
    run: Run, lengths: list[int], shortest: int
) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """Every cell: the original model's first, so that each model is loaded once.

    Nothing is asked at lengths below ``shortest``, which do not hold the question.
    """
    recipe, plan = run.recipe, run.plan
    section = recipe.evaluate
    scored = {"documents": section.documents, "lengths": lengths}
    trained = plan.trained or plan.target

    def asked(trials: int) -> dict[str, Any]:
        return {"trials": trials, "digits": section.digits, "seed": recipe.seed}

    methods = section.methods if "none" in section.methods else ("none", *section.methods)
    for method in (*methods, RESULT):
        for length in lengths:
            yield "perplexity", method, length, scored
        for length in lengths:
            if length < shortest:
                continue
            trials = section.passkey_trials_others
            if method == RESULT:
                far = section.passkey_trials_beyond
                trials = section.passkey_trials if length <= trained else far
            if trials:
                yield "passkey", method, length, asked(trials)
            if method == RESULT and section.needle_trials:
                yield "needle", method, length, asked(section.needle_trials)
    for length in lengths:
        if length <= run.pair.recovery_length:
            yield "perplexity", WITHOUT, length, scored


def _chosen(run: Run, method: str) -> Chosen:
    if method == RESULT:
        return run.pair.choose
    if method == WITHOUT:
        return lambda length: run.pair.long
    return lambda length: run.facts.rescale(method, run.plan.target, length)


def _forward(run: Run, loaded: LoadedModel) -> LongForward:
    hidden = run.recipe.hidden_device
    return LongForward(loaded.model, run.recipe.chunk, torch.device(hidden) if hidden else None)


def _perplexity(
    run: Run, loaded: LoadedModel, rescale: Rescale, length: int, options: dict[str, Any]
) -> dict[str, Any]:
    documents = run.pools.evaluation_documents(run.plan.target, options["documents"])
    with installed(loaded.model, rescale):
        scores = score(
            _forward(run, loaded),
            documents,
            length,
            bos=run.pools.bos,
            lengths=options["lengths"],
            tokens_per_document=run.plan.target,
        )
    return {
        "perplexity": finite_or_none(scores.perplexity),
        "standard_error": scores.standard_error,
        "tokens": scores.tokens,
    }


def _passkey(
    run: Run, loaded: LoadedModel, rescale: Rescale, length: int, options: dict[str, Any]
) -> dict[str, Any]:
    def make(length: int, depth: float, rng: Any) -> Prompt:
        return passkey_prompt(loaded.tokenizer, length, depth, rng, options["digits"])

    return _asked(run, loaded, make, rescale, length, options)


def _needle(
    run: Run, loaded: LoadedModel, rescale: Rescale, length: int, options: dict[str, Any]
) -> dict[str, Any]:
    lines = haystack_lines(run.pools.evaluation, loaded.tokenizer)

    def make(length: int, depth: float, rng: Any) -> Prompt:
        return needle_prompt(loaded.tokenizer, lines, length, depth, rng, options["digits"])

    return _asked(run, loaded, make, rescale, length, options)


def _asked(
    run: Run,
    loaded: LoadedModel,
    make: Callable[[int, float, Any], Prompt],
    rescale: Rescale,
    length: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    forward, trials = _forward(run, loaded), options["trials"]
    rows = retrieve(forward, make, length, rescale, trials=trials, seed=options["seed"])
    return {"rows": [[row.depth, row.correct, row.trials] for row in rows]}


_MEASURES = {"perplexity": _perplexity, "passkey": _passkey, "needle": _needle}


class _Cells:
    """What is measured already, by what was measured and how."""

    def __init__(self, path: Path):
        self.path = path
        lines = read_lines(path)
        # A line that a kill cut short is dropped from the file too.
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._found = {line["key"]: line["found"] for line in lines}

    @staticmethod
    def _key(*what: Any) -> str:
        return json.dumps(what, sort_keys=True)

    def known(self, *what: Any) -> bool:
        return self._key(*what) in self._found

    def __getitem__(self, what: tuple) -> dict[str, Any]:
        return self._found[self._key(*what)]

    def add(self, kind: str, method: str, length: int, options: Any, found: Any) -> None:
        key = self._key(kind, method, length, options)
        append_line(self.path, {"key": key, "found": found})
        self._found[key] = found


def _results(run: Run, cells: _Cells, wanted: list[tuple]) -> dict[str, Any]:
    plan, pair = run.plan, run.pair
    rows: dict[str, list[dict[str, Any]]] = {"perplexity": [], "passkey": [], "needle": []}
    for cell in wanted:
        kind, method, length, _ = cell
        if kind == "perplexity":
            rows[kind].append({"length": length, "method": method} | cells[cell])
        else:
            rows[kind] += [
                {"length": length, "method": method}
                | {"depth": depth, "correct": correct, "trials": trials}
                for depth, correct, trials in cells[cell]["rows"]
            ]
    found = {(row["method"], row["length"]): row["perplexity"] for row in rows["perplexity"]}
    recovery = [
        {
            "length": length,
            "original": found["none", length],
            "without": found[WITHOUT, length],
            "with": found[RESULT, length],
        }
        for method, length in found
        if method == WITHOUT
    ]
    stages = [
        {"name": stage.name} | {k: record.get(k, 0) for k in ("seconds", "forwards", "tokens")}
        for stage in plan.stages
        if stage.kind not in ("evaluate", "report")
        for record in [run.record(stage.name)]
    ]
    return {
        "schema": SCHEMA,
        "model": run.facts.source,
        "architecture": run.facts.architecture,
        "parameters": run.facts.parameters,
        "original_length": plan.original,
        "trained_length": plan.trained,
        "recovery_length": pair.recovery_length,
        "target": plan.target,
        "attention_factor": pair.long.attention_factor,
        **rows,
        "recovery": recovery,
        "stages": stages,
        "versions": {
            "longrope": longrope.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
