"""Benchmarks of an extended model against the original: the same questions asked of both."""

import math
from collections.abc import Callable
from typing import Any

from longrope.evaluate.benchmarks import BenchmarkOptions, Scores, ask_benchmark
from longrope.evaluate.tasks import is_ruler
from longrope.evaluate.unfinished import Unfinished
from longrope.model import LoadedModel
from longrope.rope.rescale import Rescale


def compare_with_original(
    loaded: LoadedModel,
    choose: Callable[[int], Rescale],
    longest: int,
    original: LoadedModel | None,
    options: BenchmarkOptions,
    unfinished: Unfinished,
) -> list[dict[str, Any]]:
    """Rows of :func:`paired`, for every task; what is unfinished goes on.

    Args:
        longest: tokens that the extended model is made for.
        original: what to compare with; None takes the same weights, unscaled.

    Raises:
        ValueError: as :meth:`BenchmarkOptions.require_data`, or two tokenizers for RULER,
            before anything is asked.
    """
    before = original or loaded
    window = before.facts.original_max_position_embeddings
    assert window is not None
    same = before.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    if not same and any(is_ruler(task) for task in options.tasks):
        raise ValueError("RULER makes its texts by the tokenizer: --original needs the same one")
    options.require_data(before.tokenizer, min(window, longest))
    unscaled = before.facts.rescale("none", window)
    rows = []
    for task in options.tasks:
        kept = unfinished.answers(before, [unscaled], task=task, **options.asked())
        answers = ask_benchmark(before, lambda tokens: unscaled, window, task, options, kept)
        kept = unfinished.answers(
            loaded, [choose(1), choose(longest)], task=task, **options.asked()
        )
        extended = ask_benchmark(loaded, choose, longest, task, options, kept)
        rows += [paired(row, answers.get(row, {}), extended[row]) for row in extended]
    return rows


def paired(task: str, original: Scores, extended: Scores) -> dict[str, Any]:
    """A row: both models' shares of right answers, and their difference with its 95% interval.

    The interval is that of the mean difference over questions, each asked both models.

    Raises:
        ValueError: they were asked different questions.
    """
    if original.keys() != extended.keys():
        raise ValueError(f"benchmark {task}: the two models were not asked the same questions")
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
