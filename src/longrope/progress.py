"""Long work shows itself: a bar on a terminal, plain lines in a log file."""

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' advice, and without bars but those of what is fetched."""
    import tqdm
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as theirs

    verbosity, hub_verbosity = theirs.get_verbosity(), hub.get_verbosity()
    begin = tqdm.tqdm.__init__

    def hidden(self: Any, *args: Any, **options: Any) -> None:
        if type(self).__module__.startswith(("huggingface_hub.", "datasets.")):
            options.setdefault("disable", None)  # where there is no terminal
        else:
            options["disable"] = True
        begin(self, *args, **options)

    theirs.set_verbosity_error()
    hub.set_verbosity_error()
    tqdm.tqdm.__init__ = hidden
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.set_verbosity(verbosity)
        hub.set_verbosity(hub_verbosity)
        tqdm.tqdm.__init__ = begin
