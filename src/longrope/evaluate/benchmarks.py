"""Standard benchmarks by lm-eval: an extended model against the original, question by question.

The prompts, answers and metrics are lm-eval's; the shots are the paper's unless told
otherwise. RULER is asked the same way: its tasks make their texts at the lengths given.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from longrope.evaluate.local_data import local_datasets
from longrope.model import LoadedModel
from longrope.rope.rescale import Rescale
from longrope.source import quiet

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
    """What is asked.

    Args:
        tasks: lm-eval's names of tasks and groups.
        questions: at most so many a task, the parts of a group together; None asks all.
        shots: examples before each question; None takes the paper's.
        data: folder with local copies of the hub's data sets.
        lengths: tokens, for RULER's tasks.
    """

    tasks: tuple[str, ...]
    questions: int | None = None
    shots: int | None = None
    data: str | None = None
    lengths: tuple[int, ...] = ()
    chunk: int = 2048

    def check(self) -> None:
        """Refuse what cannot be asked, before any model is read.

        Raises:
            ValueError: names the option, its value and the remedy.
        """
        require_harness()
        if self.questions is not None and self.questions < 1:
            raise ValueError(f"--questions is {self.questions}; it must be at least 1")
        if self.shots is not None and self.shots < 0:
            raise ValueError(f"--shots is {self.shots}; it must not be negative")
        if self.data is not None and not Path(self.data).is_dir():
            raise ValueError(f"--benchmark-data {self.data}: no such folder")
        known = _manager().task_index
        for task in self.tasks:
            if task not in known:
                near = ", ".join(name for name in known if name.startswith(task[:4]))[:200]
                raise ValueError(
                    f"--benchmarks: lm-eval has no task {task!r}; 'lm-eval ls tasks' lists them"
                    + (f" (such as {near})" if near else "")
                )
            if _is_ruler(task) and min(self.lengths, default=0) < RULER_TOKENS:
                raise ValueError(
                    f"--benchmarks {task} makes its texts; give --lengths of {RULER_TOKENS:,} "
                    "tokens or more"
                )

    def require_data(self) -> None:
        """Refuse what cannot be read, before hours of work that end in asking it.

        Raises:
            ValueError: the data can be read neither from the hub nor locally.
        """
        with _silent(), local_datasets(self.data):
            for task in self.tasks:
                if not _is_ruler(task):
                    _load(task, _manager())


def require_harness() -> None:
    """Refuse benchmarks where lm-eval is missing.

    Raises:
        ValueError: names the extra that brings it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--benchmarks needs: pip install 'longrope[benchmarks]'")


def ask_benchmarks(
    loaded: LoadedModel,
    choose: Callable[[int], Rescale],
    longest: int,
    options: BenchmarkOptions,
) -> dict[str, Scores]:
    """Every task of the options, asked one model; see :func:`ask_benchmark`."""
    scores: dict[str, Scores] = {}
    for task in options.tasks:
        scores |= ask_benchmark(loaded, choose, longest, task, options)
    return scores


def compare_with_original(
    loaded: LoadedModel,
    choose: Callable[[int], Rescale],
    longest: int,
    original: LoadedModel | None,
    options: BenchmarkOptions,
) -> list[dict[str, Any]]:
    """Rows of :func:`paired`: an extended model against ``original``, or itself unscaled."""
    extended = ask_benchmarks(loaded, choose, longest, options)
    before = original or loaded
    window = before.facts.original_max_position_embeddings
    assert window is not None
    unscaled = before.facts.rescale("none", window)
    answers = ask_benchmarks(before, lambda tokens: unscaled, window, options)
    return [paired(task, answers[task], extended[task]) for task in extended]


def ask_benchmark(
    loaded: LoadedModel,
    choose: Callable[[int], Rescale],
    longest: int,
    task: str,
    options: BenchmarkOptions,
) -> dict[str, Scores]:
    """Ask one model the questions of a task, under the rescale for each one's length.

    Args:
        longest: tokens that the model is made for; longer prompts lose their beginning.

    Returns:
        Scores of a task by question; of RULER's tasks one for each length, ``task at length``.

    Raises:
        ValueError: the data can be read neither from the hub nor locally, or lacks shots.
    """
    from lm_eval.evaluator import simple_evaluate

    from longrope.evaluate.harness import HarnessModel

    shots = SHOTS.get(task) if options.shots is None else options.shots
    with _silent(), local_datasets(options.data), tempfile.TemporaryDirectory() as directory:
        loaded.tokenizer.save_pretrained(directory)  # RULER's tasks load it by name
        manager = _manager()
        if _is_ruler(task):
            manager = _maker(task, directory, options.lengths)
        parts = _load(task, manager)
        limit = None if options.questions is None else math.ceil(options.questions / len(parts))
        found = simple_evaluate(
            HarnessModel(loaded, choose, longest, options.chunk, task),
            tasks=parts,
            task_manager=manager,
            num_fewshot=shots,
            samples={part.task_name: _asked(part, limit) for part in parts},
            bootstrap_iters=0,
        )
    assert found is not None and "samples" in found
    scores: dict[str, Scores] = {}
    for part, samples in found["samples"].items():
        for sample in samples:
            name, score = _scored(task, sample)
            scores.setdefault(name, {})[f"{part} {sample['doc_id']}"] = score
    return scores


def paired(task: str, original: Scores, extended: Scores) -> dict[str, Any]:
    """A row: both models' shares of right answers, and their difference with its 95% interval.

    The interval is that of the mean difference over questions, each asked both models.
    """
    assert original.keys() == extended.keys()
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


def _scored(task: str, sample: Mapping[str, Any]) -> tuple[str, float]:
    for metric in _METRICS:
        if metric in sample:
            return task, float(sample[metric])
    length = str(sample["doc"]["max_length"])  # RULER: a metric for each length
    return f"{task} at {int(length):,}", float(sample[length])


def _load(task: str, manager: Any) -> list[Any]:
    from datasets.exceptions import DatasetsError

    try:
        return list(manager.load([task])["tasks"].values())
    except ImportError as error:
        raise ValueError(
            f"--benchmarks {task} needs: pip install 'longrope[benchmarks]' ({error.name or error})"
        ) from None
    except (OSError, DatasetsError, LookupError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"--benchmarks {task}: its data cannot be read ({lines[0]}); where the hub is out of "
            "reach give local copies with --benchmark-data DIR"
        ) from None


@functools.cache  # it reads thousands of files
def _manager() -> Any:
    with _silent():
        from lm_eval.tasks import TaskManager

        return TaskManager()


def _is_ruler(task: str) -> bool:
    return "ruler" in str(_manager().task_index[task].yaml_path)


def _maker(task: str, tokenizer: str, lengths: Sequence[int]) -> Any:
    """The tasks beside RULER's ``task``, which make texts of so many of its tokenizer's tokens."""
    from lm_eval.tasks import TaskManager

    folder = Path(_manager().task_index[task].yaml_path).parent
    metadata: Any = {"tokenizer": tokenizer, "max_seq_lengths": list(lengths)}
    return TaskManager(include_path=folder, include_defaults=False, metadata=metadata)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without lm-eval's log lines and its bars, one for each part of a group."""
    import lm_eval.api.task as building

    logger = logging.getLogger("lm_eval")
    before = logger.level, building.tqdm
    building.tqdm = functools.partial(building.tqdm, disable=True)
    logger.setLevel(logging.ERROR)
    try:
        with quiet():
            yield
    finally:
        logger.setLevel(before[0])
        building.tqdm = before[1]
