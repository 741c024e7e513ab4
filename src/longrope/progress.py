"""Progress bars on a terminal and progress lines in a log; quiet libraries."""

import contextlib
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

_LINE_EVERY = 10.0  # seconds between lines where there is no terminal
_ANNOUNCED_AFTER = 1.5  # seconds that work may take without a word
_RECENT = 30  # latest pieces of work that the time left is estimated from

Advance = Callable[[int, str], None]


def plain_console(stderr: bool) -> Console:
    """Return a console that prints text as it is: no markup, emoji codes or highlighted numbers."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


console = plain_console(stderr=True)


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
        what_column = TextColumn("{task.description}", markup=False)
        note_column = TextColumn("{task.fields[note]}", markup=False)
        columns = (what_column, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), note_column)
        with Bar(*columns, console=console) as bar:
            task = bar.add_task(what, total=total, note="")
            yield lambda done, note: bar.update(task, completed=done, note=note)
    else:
        last, latest = [time.monotonic()], ["starting"]

        def line(done: int, note: str) -> None:
            latest[0] = note
            if done >= total or time.monotonic() - last[0] >= _LINE_EVERY:
                last[0] = time.monotonic()
                print(f"{what} {done}/{total} {note}", file=sys.stderr, flush=True)

        with _after_a_moment(lambda: print(f"{what}: {latest[0]} …", file=sys.stderr, flush=True)):
            yield line


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Print what a ``with`` block does if it takes more than a moment, on the first process."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with _after_a_moment(lambda: console.print(f"{what} …", soft_wrap=True)):
        yield


@contextlib.contextmanager
def _after_a_moment(say: Callable[[], None]) -> Iterator[None]:
    """Call a function once if a ``with`` block takes more than a moment."""
    timer = threading.Timer(_ANNOUNCED_AFTER, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def seconds_left(done: Sequence[tuple[float, float]], left: float) -> float | None:
    """Estimate the seconds that work takes, from pieces of it that were measured.

    Args:
        done: (cost, seconds) of every piece so far, in any unit of cost.
        left: cost of the work that is left.

    Returns:
        None while nothing was measured.
    """
    # The first piece includes start-up work.
    recent = done[1:][-_RECENT:] or done
    cost = sum(cost for cost, _ in recent)
    return left * sum(seconds for _, seconds in recent) / cost if cost else None


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
