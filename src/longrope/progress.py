"""Long work shows itself: a bar on a terminal, plain lines in a log file."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

console = Console(stderr=True)
_LINE_EVERY = 10.0  # seconds between lines where there is no terminal

Advance = Callable[[int, str], None]


@contextlib.contextmanager
def progress(what: str, total: int, show: bool = True) -> Iterator[Advance]:
    """Give ``advance(done, note)``: how much of ``total`` is done, and what to say of it."""
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


def duration(seconds: float) -> str:
    """Such as ``1 h 05 min``, or ``12 days``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02d} min" if hours < 72 else f"{hours / 24:,.0f} days"
