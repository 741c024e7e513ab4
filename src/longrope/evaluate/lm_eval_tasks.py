"""Load lm-eval's tasks from the hub or a directory, and generate RULER's.

This module can be imported without lm-eval.
"""

import contextlib
import functools
import importlib.util
import logging
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longrope.evaluate.local_data import local_datasets
from longrope.files.atomic import temporary_directory
from longrope.progress import discard_stderr, quiet

REMEDY = "give a directory with local copies as `datasets` (evaluate.benchmarks.datasets)"


def require_harness() -> None:
    """Check that lm-eval is installed, before its tasks are loaded.

    Raises:
        ValueError: it is not; names the extra that installs it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("benchmarks require lm-eval: pip install 'longrope[benchmarks]'")


@contextlib.contextmanager
def task_parts(
    task: str, tokenizer: Any, lengths: Sequence[int], data: str | None
) -> Iterator[list[Any]]:
    """Load the parts of an lm-eval task with their questions; RULER's tasks generate them.

    Args:
        task: name of a task or group.
        lengths: tokens of RULER's texts.
        data: directory with local copies of the hub's datasets, or None.

    Raises:
        ValueError: data that cannot be read, or a missing dependency of the task.
    """
    source = manager()
    with _silent(), local_datasets(data), temporary_directory() as directory:
        if is_ruler(task):
            tokenizer.save_pretrained(directory)  # RULER's generators load it by name
            source = _ruler_manager(task, str(directory), lengths)
        # RULER's progress bars have no switch.
        hidden = discard_stderr() if is_ruler(task) else contextlib.nullcontext()
        with _fixed_seeds(), hidden:
            parts = _load(task, source)
        yield parts


@contextlib.contextmanager
def _fixed_seeds() -> Iterator[None]:
    """Fix the global seeds, so that RULER's tasks generate the same texts for every model."""
    with contextlib.suppress(ImportError):
        import nltk  # type: ignore[import-not-found]  # noqa: F401  # its import draws numbers
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
            f"benchmark {task!r} requires {error.name or error}: pip install 'longrope[benchmarks]'"
        ) from None
    except (OSError, DatasetsError, LookupError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"benchmark {task!r}: its data cannot be read ({lines[0]}); without access to the hub, "
            f"{REMEDY}"
        ) from None


@functools.cache  # it reads thousands of files
def manager() -> Any:
    """Return lm-eval's task manager."""
    with _silent():
        from lm_eval.tasks import TaskManager

        return TaskManager()


def is_ruler(task: str) -> bool:
    """Return whether an lm-eval task is one of RULER's, which generate texts of given lengths."""
    path = manager().task_index[task].yaml_path
    return path is not None and Path(path).parent.name == "ruler"


def _ruler_manager(task: str, tokenizer: str, lengths: Sequence[int]) -> Any:
    """Return an lm-eval task manager whose RULER tasks generate texts of these lengths."""
    from lm_eval.tasks import TaskManager

    # One task seeds its own random generator on import, so import it again.
    sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)
    directory = Path(manager().task_index[task].yaml_path).parent
    metadata: Any = {"tokenizer": tokenizer, "max_seq_lengths": list(lengths)}
    return TaskManager(include_path=directory, include_defaults=False, metadata=metadata)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silence lm-eval's progress bars and log, and what RULER's tasks print."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet(), contextlib.redirect_stdout(None):
            yield
    finally:
        logger.setLevel(before)


def generation_settings(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return an lm-eval task's ``generation_kwargs`` as lm-eval's own models read them."""
    from lm_eval.models.utils import normalize_gen_kwargs

    return dict(normalize_gen_kwargs(dict(asked)))
