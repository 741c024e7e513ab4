"""The content of ``results.json``: a run's results in rows that other programs read."""

import platform
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import transformers

from longrope.evaluate.measure import Measurement
from longrope.evaluate.statistics import benchmark_difference
from longrope.labels import RESULT, WITHOUT
from longrope.pipeline.run_state import Run
from longrope.version import __version__

SCHEMA = 1


class RunMeasurement(NamedTuple):
    """One cell of a run's results: a measurement, and the name of the factors that it is under."""

    method: str
    measurement: Measurement


Measured = Sequence[tuple[RunMeasurement, dict[str, Any]]]


def run_results(run: Run, measured: Measured) -> dict[str, Any]:
    """Return a run's results as the content of ``results.json``."""
    plan, pair = run.plan, run.pair
    perplexity = [
        {"length": cell.measurement.length, "method": cell.method} | found
        for cell, found in measured
        if cell.measurement.kind == "perplexity"
    ]
    return {
        "schema": SCHEMA,
        "model": run.info.source,
        "architecture": run.info.architecture,
        "parameters": run.info.parameters,
        "original_length": plan.original,
        "trained_length": plan.trained,
        "recovery_length": pair.recovery_length,
        "target": plan.target,
        "attention_factor": pair.long.attention_factor,
        "perplexity": perplexity,
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
