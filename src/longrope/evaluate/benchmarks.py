"""Standard benchmarks by lm-eval: one model's answers, question by question.

The prompts, answers and metrics are lm-eval's; the shots are the paper's unless told
otherwise. RULER is asked the same way: its tasks make their texts at the lengths given, the
same ones every time.
"""

import dataclasses
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
from longrope.models.load import LoadedModel
from longrope.progress import progress
from longrope.rope.rescale import Rescale

# The paper's table 6; what is not named has its task's own.
SHOTS = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc1": 0}
# Of the metrics that a task has, the first of these.
_METRICS = ("acc_norm", "acc", "exact_match")

# Tokens under which RULER's makers try for ever to fit their own example into the text.
RULER_TOKENS = 2048

# Question → how right the answer was, 0 to 1.
Scores = dict[str, float]


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions:
    """Options of benchmark measurements.

    Args:
        tasks: names of lm-eval tasks and groups.
        questions: questions per task at most, over all parts of a group; None asks all.
        shots: examples before each question; None takes the paper's.
        data: directory with local copies of the hub's datasets; None reads from the hub.
        lengths: tokens of RULER's texts.
    """

    tasks: tuple[str, ...]
    questions: int | None = None
    shots: int | None = None
    data: str | None = None
    lengths: tuple[int, ...] = ()

    def check(self) -> None:
        """Check the options before any weight is read.

        Raises:
            ValueError: names the option, its value and the remedy.
        """
        require_harness()
        if self.questions is not None and self.questions < 1:
            raise ValueError(f"--questions is {self.questions}; it must be at least 1")
        if self.shots is not None and self.shots < 0:
            raise ValueError(f"--shots is {self.shots}; it must not be negative")
        if self.data is not None and not Path(self.data).is_dir():
            raise ValueError(f"benchmark data {self.data}: no such directory; {REMEDY}")
        known, shortest = manager().task_index, min(self.lengths, default=0)
        for task in self.tasks:
            if task not in known:
                near = ", ".join(name for name in known if name.startswith(task[:4]))[:200]
                raise ValueError(
                    f"benchmarks: lm-eval has no task {task!r}; 'lm-eval ls tasks' lists them"
                    + (f" (such as {near})" if near else "")
                )
            if known[task].yaml_path is None and any(is_ruler(part) for part in known[task].tags):
                raise ValueError(f"benchmark {task} is a tag of RULER's; ask for ruler itself")
            if is_ruler(task) and shortest < RULER_TOKENS:
                raise ValueError(
                    f"benchmark {task} makes its texts; give lengths of {RULER_TOKENS:,} "
                    "tokens or more"
                )

    def require_data(self, tokenizer: Any, window: int) -> None:
        """Refuse what cannot be read or asked, before hours of work that end in asking it.

        Args:
            window: tokens of the smallest model asked.

        Raises:
            ValueError: the data can be read neither from the hub nor locally, or lacks
                examples; answers that longrope does not compare, or that the window cannot hold.
        """
        for task in self.tasks:
            with task_parts(task, tokenizer, [RULER_TOKENS], self.data) as parts:
                for part in parts:
                    _check_part(task, part, _shots(task, part, self), window)


def score_benchmark(
    loaded: LoadedModel,
    choose: Callable[[int], Rescale],
    longest: int,
    task: str,
    options: BenchmarkOptions,
    kept: MutableMapping[str, dict[str, Scores]] | None = None,
    *,
    chunk: int | None = None,
    offload_activations: str | None = None,
) -> dict[str, Scores]:
    """Ask one model the questions of a task, under the rescale for each one's length.

    Args:
        longest: tokens that the model is made for; longer prompts lose their beginning.
        kept: what each part of the task gave, as it is answered; a part in it is not asked again.

    Returns:
        Scores of a task by question; of RULER's tasks one for each length, ``task at length``.

    Raises:
        ValueError: as :meth:`BenchmarkOptions.require_data`.
    """
    from lm_eval.evaluator import evaluate

    from longrope.evaluate.lm_eval_model import HarnessModel

    kept = {} if kept is None else kept
    scores: dict[str, Scores] = {}
    with (
        task_parts(task, loaded.tokenizer, options.lengths, options.data) as parts,
        progress(task, len(parts), show=len(parts) > 1) as advance,
    ):
        title = task if len(parts) == 1 else ""
        model = HarnessModel(loaded, choose, longest, chunk, title, offload_activations)
        for number, part in enumerate(parts):
            name, shots = part.task_name, _shots(task, part, options)
            if name not in kept:
                _check_part(task, part, shots, longest)
                part.set_config(key="num_fewshot", value=shots)
                part.set_fewshot_seed(seed=1234)  # lm-eval's own
                limit = options.questions
                if limit is not None:
                    limit = limit // len(parts) + (number < limit % len(parts))
                asked = _asked(part, limit)
                found = evaluate(
                    model, {"tasks": {name: part}}, samples={name: asked}, bootstrap_iters=0
                )
                assert found is not None and "samples" in found
                kept[name] = _scored(task, name, found["samples"][name]) if asked else {}
            for row, answers in kept[name].items():
                scores.setdefault(row, {}).update(answers)
            advance(number + 1, name)
    return scores


def _asked(part: Any, limit: int | None) -> list[int]:
    """The first questions; of RULER's tasks the first of each length."""
    counts: dict[Any, int] = {}
    chosen = []
    for index, doc in enumerate(part.eval_docs):
        length = doc.get("max_length")
        counts[length] = counts.get(length, 0) + 1
        if limit is None or counts[length] <= limit:
            chosen.append(index)
    return chosen


def _scored(task: str, part: str, samples: Sequence[Mapping[str, Any]]) -> dict[str, Scores]:
    """Scores by row and question; of a task that reads its answers in several ways, by the first.

    A question is known by its text too, so that no other can pass for it.
    """
    scores: dict[str, Scores] = {}
    for sample in samples:
        if sample["filter"] != samples[0]["filter"]:
            continue
        row, metric = task, next((m for m in _METRICS if m in sample), "")
        if not metric:  # RULER: a metric for each length
            metric = str(sample["doc"]["max_length"])
            row = f"{task} at {int(metric):,}"
        question = f"{part} {sample['doc_id']} {sample['doc_hash'][:16]}"
        scores.setdefault(row, {})[question] = float(sample[metric])
    return scores


def _shots(task: str, part: Any, options: BenchmarkOptions) -> int:
    """As lm-eval has it: a task that says none has none, whatever is asked for."""
    own = part.get_config("num_fewshot")
    asked = SHOTS.get(task) if options.shots is None else options.shots
    return (own or 0) if own == 0 or asked is None else asked


def _check_part(task: str, part: Any, shots: int, window: int) -> None:
    if not (is_ruler(task) or set(part.aggregation()) & set(_METRICS)):
        raise ValueError(
            f"benchmark {task} is measured by {', '.join(part.aggregation())}; longrope compares "
            f"{', '.join(_METRICS)}: choose another"
        )
    if part.OUTPUT_TYPE == "generate_until":
        how = generation_settings(part.get_config("generation_kwargs") or {})
        if how["do_sample"]:
            raise ValueError(f"benchmark {task} draws its answers by chance: choose another")
        if how["max_gen_toks"] >= window:
            raise ValueError(
                f"benchmark {task} takes answers of {how['max_gen_toks']} tokens, and a model "
                f"asked has a window of {window:,}: choose another"
            )
    if shots and (examples := len(list(part.fewshot_docs()))) < shots:
        raise ValueError(
            f"benchmark {task} has {examples} examples for {shots} shots; ask for fewer with "
            "--shots, or evaluate.benchmark_shots in a recipe"
        )
