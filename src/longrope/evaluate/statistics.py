"""Confidence intervals, paired differences and standard errors."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from longrope.evaluate.benchmarks import QuestionScores


def benchmark_difference(
    task: str, original: QuestionScores, extended: QuestionScores
) -> dict[str, Any]:
    """Compute the paired difference of two models on the same questions, with its 95% interval.

    Returns:
        A table row: both models' mean scores, and the mean paired difference with its 95%
        interval (normal approximation over questions).

    Raises:
        ValueError: the questions differ.
    """
    if original.keys() != extended.keys():
        raise ValueError(
            f"benchmark {task!r}: the two models answered different questions; score both with the "
            "same options"
        )
    differences = [extended[key] - original[key] for key in original]
    count = len(differences)
    mean = sum(differences) / count
    variance = sum((d - mean) ** 2 for d in differences) / max(1, count - 1)
    spread = 1.959964 * math.sqrt(variance / count)
    return {
        "task": task,
        "questions": count,
        "original": sum(original.values()) / count,
        "extended": sum(extended.values()) / count,
        "difference": mean,
        "low": mean - spread,
        "high": mean + spread,
    }


def ratio_standard_error(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Return the standard error of Σ sums / Σ counts over documents; None if it is undefined."""
    n = len(sums)
    if n < 2 or not np.isfinite(sums).all():
        return None
    residuals = sums - sums.sum() / counts.sum() * counts
    return float(math.sqrt(n / (n - 1) * np.square(residuals).sum()) / counts.sum())


def wilson(correct: int, trials: int) -> tuple[float, float]:
    """Return the 95% interval of a proportion (Wilson's score interval)."""
    z, share = 1.959964, correct / trials
    middle = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def retrieval_totals(rows: Iterable[Mapping[str, Any]]) -> dict[int, tuple[int, int]]:
    """Sum correct answers and trials over depths for intervals: (correct, trials) by length."""
    result: dict[int, tuple[int, int]] = {}
    for row in rows:
        correct, trials = result.get(row["length"], (0, 0))
        result[row["length"]] = correct + row["correct"], trials + row["trials"]
    return result
