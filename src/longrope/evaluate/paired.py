"""Benchmarks of an extended model against the original: the same questions asked of both."""

from collections.abc import Callable
from typing import Any

from longrope.evaluate.benchmarks import BenchmarkOptions, ask_benchmark
from longrope.evaluate.cache import MeasurementCache
from longrope.evaluate.lm_eval_tasks import is_ruler
from longrope.evaluate.statistics import paired
from longrope.models.load import LoadedModel
from longrope.rope.rescale import Rescale


def compare_with_original(
    loaded: LoadedModel,
    choose: Callable[[int], Rescale],
    longest: int,
    original: LoadedModel | None,
    options: BenchmarkOptions,
    unfinished: MeasurementCache,
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
    window = before.info.original_max_position_embeddings
    assert window is not None
    same = before.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    if not same and any(is_ruler(task) for task in options.tasks):
        raise ValueError("RULER makes its texts by the tokenizer: --original needs the same one")
    options.require_data(before.tokenizer, min(window, longest))
    unscaled = before.info.rescale("none", window)
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
