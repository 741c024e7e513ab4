"""Progress bars on a terminal and progress lines in a log; quiet libraries."""

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

console = Console(stderr=True)
_LINE_EVERY = 10.0  # seconds between lines where there is no terminal

Advance = Callable[[int, str], None]


@contextlib.contextmanager
def progress(what: str, total: int, show: bool = True) -> Iterator[Advance]:
    """Show a progress bar or lines in a ``with`` block, which yields ``advance(done, note)``.

    Args:
        what: label of the bar.
        total: the value of ``done`` at the end.
        show: False shows nothing.
    """
    if not show:
        yield lambda done, note: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Bar(*columns, TextColumn("{task.fields[note]}"), console=console) as bar:
            task = bar.add_task(what, total=total, note="")
            yield lambda done, note: bar.update(task, completed=done, note=note)
    else:
        last = [time.monotonic()]

        def line(done: int, note: str) -> None:
            if done >= total or time.monotonic() - last[0] >= _LINE_EVERY:
                last[0] = time.monotonic()
                print(f"{what} {done}/{total} {note}", file=sys.stderr, flush=True)

        yield line


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence other libraries' warnings and progress bars, except those of downloads.

    Uses the libraries' own switches. The hub shows its bars only on a terminal; those of
    ``datasets`` are switched off without one, if the library is imported already.
    """
    from huggingface_hub import utils as hub
    from transformers.utils import logging as theirs

    datasets = sys.modules.get("datasets")
    verbosity, hub_verbosity = theirs.get_verbosity(), hub.logging.get_verbosity()
    bars, download_bars = theirs.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    hide_datasets = (
        datasets is not None
        and not console.is_terminal
        and not datasets.utils.are_progress_bars_disabled()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.set_verbosity_error()
        hub.logging.set_verbosity_error()
        theirs.disable_progress_bar()  # the hub's too
        if download_bars:
            hub.enable_progress_bars()
        if datasets is not None and hide_datasets:
            datasets.disable_progress_bars()
        try:
            yield
        finally:
            theirs.set_verbosity(verbosity)
            hub.logging.set_verbosity(hub_verbosity)
            if bars:
                theirs.enable_progress_bar()
            if datasets is not None and hide_datasets:
                datasets.enable_progress_bars()


@contextlib.contextmanager
def discard_stderr() -> Iterator[None]:
    """Discard standard error, for libraries whose progress bars have no switch."""
    with open(os.devnull, "w", encoding="utf-8") as null, contextlib.redirect_stderr(null):
        yield
