"""Standard benchmarks and RULER through lm-eval, scored question by question.

Prompts, answers and metrics are lm-eval's; the default shots are the paper's. RULER's tasks
generate their texts at the lengths given, the same texts for every model.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from longrope.evaluate.lm_eval_tasks import (
    REMEDY,
    generation_settings,
    is_ruler,
    manager,
    require_harness,
    task_parts,
)
from longrope.evaluate.settings import BenchmarkConfig
from longrope.models.load import LoadedModel
from longrope.progress import progress
from longrope.rope.rescale import Rescale

# Shots of the paper's table 6; other tasks use their own default.
SHOTS = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc1": 0}
# The first of these that a task has is used.
_METRICS = ("acc_norm", "acc", "exact_match")

# The shortest text that RULER can generate: below it, its own example does not fit.
RULER_TOKENS = 2048

# Score of each question, 0 to 1.
QuestionScores = dict[str, float]


def check_benchmarks(config: BenchmarkConfig) -> None:
    """Check that benchmarks can run: lm-eval's tasks, local data, and lengths for RULER.

    Reads no weights.

    Raises:
        ValueError: names the parameter, its value and the remedy.
    """
    require_harness()
    if config.datasets is not None and not Path(config.datasets).is_dir():
        raise ValueError(f"datasets={config.datasets!r}: no such directory; {REMEDY}")
    known, shortest = manager().task_index, min(config.ruler_lengths, default=0)
    for task in config.tasks:
        if task not in known:
            near = ", ".join(name for name in known if name.startswith(task[:4]))[:200]
            raise ValueError(
                f"benchmark {task!r} is not a task of lm-eval; 'lm-eval ls tasks' lists all"
                + (f" (similar names: {near})" if near else "")
            )
        if known[task].yaml_path is None and any(is_ruler(part) for part in known[task].tags):
            raise ValueError(f"benchmark {task!r} is a tag of RULER's tasks; use 'ruler' instead")
        if is_ruler(task) and shortest < RULER_TOKENS:
            raise ValueError(
                f"benchmark {task!r} generates texts of the given lengths; set `lengths` to at "
                f"least {RULER_TOKENS:,} tokens"
            )


def require_benchmark_data(config: BenchmarkConfig, tokenizer: Any, window: int) -> None:
    """Check that the data of every benchmark task can be read and scored.

    Args:
        window: context window, in tokens, of the smallest model.

    Raises:
        ValueError: data that cannot be read from the hub or locally, or lacks examples; a
            metric that longrope does not compare; or answers that the window cannot hold.
    """
    for task in config.tasks:
        with task_parts(task, tokenizer, [RULER_TOKENS], config.datasets) as parts:
            for part in parts:
                _check_part(task, part, _shots(task, part, config), window)


def score_benchmark(
    loaded: LoadedModel,
    choose: Callable[[int], Rescale],
    longest: int,
    task: str,
    config: BenchmarkConfig,
    kept: MutableMapping[str, dict[str, QuestionScores]] | None = None,
) -> dict[str, QuestionScores]:
    """Score one model on a benchmark task, each prompt under the rescale for its length.

    Args:
        choose: returns the rescale for a sequence of so many tokens.
        longest: context window of the model in tokens; longer prompts are cut at the start.
        kept: scores by part of the task; parts in it are skipped, new ones are added.

    Returns:
        Scores by table row and question. The row is the task, or ``task at length`` for RULER.

    Raises:
        ValueError: as :func:`require_benchmark_data`.
    """
    from lm_eval.evaluator import evaluate

    from longrope.evaluate.lm_eval_model import HarnessModel

    kept = {} if kept is None else kept
    scores: dict[str, QuestionScores] = {}
    with (
        task_parts(task, loaded.tokenizer, config.ruler_lengths, config.datasets) as parts,
        progress(task, len(parts), show=len(parts) > 1) as advance,
    ):
        title = task if len(parts) == 1 else ""
        model = HarnessModel(loaded, choose, longest, title)
        for number, part in enumerate(parts):
            name, shots = part.task_name, _shots(task, part, config)
            if name not in kept:
                _check_part(task, part, shots, longest)
                part.set_config(key="num_fewshot", value=shots)
                part.set_fewshot_seed(seed=1234)  # lm-eval's default
                limit = config.limit
                if limit is not None:
                    limit = limit // len(parts) + (number < limit % len(parts))
                questions = _questions(part, limit)
                found = evaluate(
                    model, {"tasks": {name: part}}, samples={name: questions}, bootstrap_iters=0
                )
                assert found is not None and "samples" in found
                kept[name] = _scored(task, name, found["samples"][name]) if questions else {}
            for row, answers in kept[name].items():
                scores.setdefault(row, {}).update(answers)
            advance(number + 1, name)
    return scores


def _questions(part: Any, limit: int | None) -> list[int]:
    """Return the indices of a benchmark's first questions; for RULER, the first of each length."""
    counts: dict[Any, int] = {}
    chosen = []
    for index, doc in enumerate(part.eval_docs):
        length = doc.get("max_length")
        counts[length] = counts.get(length, 0) + 1
        if limit is None or counts[length] <= limit:
            chosen.append(index)
    return chosen


def _scored(
    task: str, part: str, samples: Sequence[Mapping[str, Any]]
) -> dict[str, QuestionScores]:
    """Return benchmark scores by table row and question, under the first filter of the task.

    A question's name includes a hash of its text, so that different questions never match.
    """
    scores: dict[str, QuestionScores] = {}
    for sample in samples:
        if sample["filter"] != samples[0]["filter"]:
            continue
        row, metric = task, next((m for m in _METRICS if m in sample), "")
        if not metric:  # RULER has a metric for each length
            metric = str(sample["doc"]["max_length"])
            row = f"{task} at {int(metric):,}"
        question = f"{part} {sample['doc_id']} {sample['doc_hash'][:16]}"
        scores.setdefault(row, {})[question] = float(sample[metric])
    return scores


def _shots(task: str, part: Any, config: BenchmarkConfig) -> int:
    """Return the number of few-shot examples for a part of a benchmark.

    As in lm-eval, a part that sets 0 itself ignores the option.
    """
    own = part.get_config("num_fewshot")
    wanted = SHOTS.get(task) if config.num_fewshot is None else config.num_fewshot
    return (own or 0) if own == 0 or wanted is None else wanted


def _check_part(task: str, part: Any, shots: int, window: int) -> None:
    if not (is_ruler(task) or set(part.aggregation()) & set(_METRICS)):
        raise ValueError(
            f"benchmark {task!r} reports {', '.join(part.aggregation())}, but longrope compares "
            f"only {', '.join(_METRICS)}; choose another benchmark"
        )
    if part.OUTPUT_TYPE == "generate_until":
        how = generation_settings(part.get_config("generation_kwargs") or {})
        if how["do_sample"]:
            raise ValueError(f"benchmark {task!r} samples answers at random; choose another")
        if how["max_gen_toks"] >= window:
            raise ValueError(
                f"benchmark {task!r} generates answers of up to {how['max_gen_toks']} tokens, "
                f"which do not fit into a context of {window:,} tokens; choose another benchmark"
            )
    if shots and (examples := len(list(part.fewshot_docs()))) < shots:
        raise ValueError(
            f"num_fewshot is {shots}, but benchmark {task!r} has {examples} examples; lower it"
        )
