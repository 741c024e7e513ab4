"""lm-eval's tasks as they are read: from the hub or a folder, or made by RULER.

Imported without lm-eval too; what needs it refuses in one line where it is missing.
"""

import contextlib
import functools
import importlib.util
import logging
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longrope.evaluate.local_data import local_datasets
from longrope.progress import discard_stderr, quiet

REMEDY = "give one with --benchmark-data, or evaluate.benchmark_data in a recipe"


def require_harness() -> None:
    """Refuse benchmarks where lm-eval is missing.

    Raises:
        ValueError: names the extra that brings it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("benchmarks need: pip install 'longrope[benchmarks]'")


@contextlib.contextmanager
def task_parts(
    task: str, tokenizer: Any, lengths: Sequence[int], data: str | None
) -> Iterator[list[Any]]:
    """The parts of a task with their questions; RULER's are made at these lengths."""
    source = manager()
    with _silent(), local_datasets(data), tempfile.TemporaryDirectory() as directory:
        if is_ruler(task):
            tokenizer.save_pretrained(directory)  # RULER's makers load it by name
            source = _maker(task, directory, lengths)
        # RULER's bars have no switch.
        hidden = discard_stderr() if is_ruler(task) else contextlib.nullcontext()
        with _same_chance(), hidden:
            parts = _load(task, source)
        yield parts


@contextlib.contextmanager
def _same_chance() -> Iterator[None]:
    """RULER's makers draw from the process's own generators: the same draws for every model."""
    with contextlib.suppress(ImportError):
        import nltk  # type: ignore[import-not-found]  # noqa: F401  # it draws when imported
    before = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _load(task: str, source: Any) -> list[Any]:
    from datasets.exceptions import DatasetsError

    try:
        return list(source.load([task])["tasks"].values())
    except ImportError as error:
        raise ValueError(
            f"benchmark {task} needs: pip install 'longrope[benchmarks]' ({error.name or error})"
        ) from None
    except (OSError, DatasetsError, LookupError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"benchmark {task}: its data cannot be read ({lines[0]}); where the hub is out of "
            f"reach, local copies in a folder do: {REMEDY}"
        ) from None


@functools.cache  # it reads thousands of files
def manager() -> Any:
    """What knows lm-eval's tasks by name."""
    with _silent():
        from lm_eval.tasks import TaskManager

        return TaskManager()


def is_ruler(task: str) -> bool:
    """Whether a task makes its texts, at lengths that it is given."""
    path = manager().task_index[task].yaml_path
    return path is not None and Path(path).parent.name == "ruler"


def _maker(task: str, tokenizer: str, lengths: Sequence[int]) -> Any:
    """The tasks beside RULER's ``task``, which make texts of so many of its tokenizer's tokens."""
    from lm_eval.tasks import TaskManager

    # One maker has a generator of its own, made when it is imported.
    sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)
    folder = Path(manager().task_index[task].yaml_path).parent
    metadata: Any = {"tokenizer": tokenizer, "max_seq_lengths": list(lengths)}
    return TaskManager(include_path=folder, include_defaults=False, metadata=metadata)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without bars, lm-eval's log lines, and what RULER prints."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet(), contextlib.redirect_stdout(None):
            yield
    finally:
        logger.setLevel(before)


def generation_settings(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What lm-eval's own models make of a task's ``generation_kwargs``."""
    from lm_eval.models.utils import normalize_gen_kwargs

    return dict(normalize_gen_kwargs(dict(asked)))
