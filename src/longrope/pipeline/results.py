"""The content of ``results.json``: a run's results in rows that other programs read."""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from longrope.evaluate.measure import Measurement
from longrope.evaluate.statistics import benchmark_difference
from longrope.labels import RESULT, WITHOUT, display_name, has_extended_weights
from longrope.pipeline.run_state import Run
from longrope.version import __version__

SCHEMA = 1


class RunMeasurement(NamedTuple):
    """One cell of a run's results: a measurement, and the name of the factors that it is under.

    ``other`` marks text of another kind.
    """

    method: str
    measurement: Measurement
    other: bool = False


Measured = Sequence[tuple[RunMeasurement, dict[str, Any]]]


def run_results(run: Run, measured: Measured) -> dict[str, Any]:
    """Return a run's results as the content of ``results.json``."""
    plan, pair = run.plan, run.pair
    rows = [
        (
            cell.other,
            {"length": cell.measurement.length, "method": cell.method}
            | {"fine_tuned": plan.trained is not None and has_extended_weights(cell.method)}
            | found,
        )
        for cell, found in measured
        if cell.measurement.kind == "perplexity"
    ]
    perplexity = [row for other, row in rows if not other]
    return {
        "schema": SCHEMA,
        "model": display_name(run.recipe.model),
        "architecture": run.info.architecture,
        "parameters": run.info.parameters,
        "original_length": plan.original,
        "trained_length": plan.trained,
        "recovery_length": pair.recovery_length,
        "target": plan.target,
        "attention_factor": pair.long.attention_factor,
        "effort": run.recipe.effort,
        "evaluation_documents": _names(measured, other=False),
        "perplexity": perplexity,
        "other_documents": _names(measured, other=True),
        "other_perplexity": [row for other, row in rows if other],
        "passkey": _answers(measured, "passkey"),
        "needle": _answers(measured, "needle"),
        "recovery": _recovery(perplexity),
        "benchmarks": _benchmarks(measured),
        "plan": [
            {"name": stage.name, "length": stage.length, "tokens": stage.tokens}
            | {"flops": stage.linear + stage.attention, "memory": stage.memory}
            for stage in plan.stages
        ],
        "stages": [
            {"name": stage.name} | {k: record.get(k, 0) for k in ("seconds", "forwards", "tokens")}
            for stage in plan.stages
            if stage.kind not in ("evaluate", "report")
            for record in [run.record(stage.name)]
        ],
        "versions": {
            "longrope": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _names(measured: Measured, other: bool) -> list[str]:
    """Return the names of the documents that perplexity is measured on."""
    names = [
        document.name
        for cell, _ in measured
        if cell.measurement.kind == "perplexity" and cell.other == other
        for document in cell.measurement.documents
    ]
    return [Path(name).name for name in dict.fromkeys(names)]


def _answers(measured: Measured, kind: str) -> list[dict[str, Any]]:
    return [
        {"length": cell.measurement.length, "method": cell.method}
        | {"depth": depth, "correct": correct, "trials": trials}
        for cell, found in measured
        if cell.measurement.kind == kind
        for depth, correct, trials in found["rows"]
    ]


def _recovery(perplexity: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = {(row["method"], row["length"]): row["perplexity"] for row in perplexity}
    return [
        {
            "length": length,
            "original": found["none", length],
            "without": found[WITHOUT, length],
            "with": found[RESULT, length],
        }
        for method, length in found
        if method == WITHOUT
    ]


def _benchmarks(measured: Measured) -> list[dict[str, Any]]:
    """Return the benchmark rows of ``results.json``: scores, and differences from the original."""
    scores: dict[str, dict[str, Any]] = {}
    for cell, found in measured:
        if cell.measurement.kind == "benchmark":
            for task, questions in found["scores"].items():
                scores.setdefault(task, {})[cell.method] = questions
    rows = []
    for task, found in scores.items():
        row = benchmark_difference(task, found["none"], found[RESULT])
        # Where no recovery was searched, both are the same.
        without = list(found.get(WITHOUT, found[RESULT]).values())
        row |= {"with": row.pop("extended"), "without": sum(without) / len(without)}
        rows.append(row)
    return rows
