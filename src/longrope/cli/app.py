"""The `longrope` program: start a verb, and turn errors into one line and an exit code."""

import contextlib
import logging
import os
import re
import signal
import sys
import tempfile
import traceback
from itertools import pairwise
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from longrope.errors import RankLost, first_line, printable, shortened
from longrope.version import __version__

# In the order of the work.
_VERBS = ("demo", "inspect", "plan", "search", "extend", "generate", "evaluate", "compare")
_VERBS += ("report", "export", "verify", "import")


class _InOrder(TyperGroup):
    """The verbs of the program, in the order of the work."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [verb for verb in _VERBS if verb in self.commands]


app = typer.Typer(
    name="longrope",
    cls=_InOrder,
    help="Extend the context window of any RoPE language model.",
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit()


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


_LISTS = ("--lengths", "--methods", "--tasks")  # options that take values with commas
_RESUMED = ("demo", "search", "extend", "evaluate", "compare")
# click's class; some versions of typer ship their own copy
_UsageError: Any = typer.BadParameter.__base__


def main() -> None:
    """Run the ``longrope`` program. Every error is one line.

    A user's mistake, and a file or device that fails, exit with code 2, anything unexpected with
    code 1. With ``LONGROPE_TRACEBACK`` set, errors show their traceback instead.
    """
    arguments = sys.argv[1:]
    bare = all(argument[:1] != "-" for argument in arguments) and arguments != ["demo"]
    if bare and len(arguments) <= 1 + (arguments[:1] == ["evaluate"]):
        arguments = [*arguments, "--help"]  # a verb alone prints its usage
    # A finished result is printed also where the terminal lacks some of its characters.
    with contextlib.suppress(AttributeError, OSError):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    received = _stop_on_signals()
    handler = logging.StreamHandler()
    handler.setFormatter(_WithOptions(arguments))
    logging.getLogger("longrope").addHandler(handler)
    if os.environ.get("LONGROPE_TRACEBACK"):
        app(arguments)
    code = 0
    try:
        _refuse_empty(arguments)
        _refuse_twice(arguments)
        code = app(arguments, standalone_mode=False)
        sys.stdout.flush()
    except _UsageError as error:
        _fail(error.format_message().replace("Value error, ", ""), 2)
    except ValueError as error:
        _fail(_as_options(str(error), arguments), 2)
    except KeyboardInterrupt:
        _end(_stopped(arguments), 128 + received[-1])
    except RankLost as error:
        _fail(str(error), 1)
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        _end("", 1)
    except OSError as error:
        where = shortened(str(error.filename or "the output"), 200)
        _fail(f"{where}: {error.strerror or error}", 2)
    except Exception as error:
        _fail(_unexpected(error), 1)
    if code == 130:  # typer's exit code for Ctrl-C
        _end(_stopped(arguments), 128 + received[-1])
    sys.exit(code)


def _stop_on_signals() -> list[int]:
    """Let SIGTERM and SIGHUP stop the program as Ctrl-C does, and return the signals received.

    Schedulers and ``kill`` send SIGTERM, a terminal that is closed sends SIGHUP. Signals that are
    ignored, as under ``nohup``, stay ignored.
    """
    received = [int(signal.SIGINT)]

    def stop(number: int, frame: Any) -> None:
        received.append(number)
        ctrl_c = signal.getsignal(signal.SIGINT)
        if not callable(ctrl_c):  # a shell's background job ignores Ctrl-C
            raise KeyboardInterrupt
        ctrl_c(number, frame)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, stop)
    return received


def _refuse_empty(arguments: list[str]) -> None:
    """Refuse empty arguments, which an unset shell variable leaves and paths take for ``.``."""
    for option, value in pairwise(["", *arguments]):
        name, equals, rest = value.partition("=")
        if not value:
            name = option if option.startswith("--") else "an argument"
        elif not (equals and not rest and name.startswith("--")):
            continue
        if name != "--prompt":
            raise ValueError(f"{name} is empty; give a value, or leave it out")


def _refuse_twice(arguments: list[str]) -> None:
    """Refuse a list that is given twice, of which only the last value would count."""
    for name in _LISTS:
        given = sum(a == name or a.startswith(f"{name}=") for a in arguments)
        if given > 1:
            raise ValueError(
                f"{name} is given {given} times; give it once, with commas between its values"
            )


def _unexpected(error: Exception) -> str:
    """Describe an error that longrope did not foresee, and write its traceback to a file."""
    if type(error).__name__ == "OutOfMemoryError":
        return "the GPU is out of memory: try --offload-weights, or a shorter length"
    if isinstance(error, MemoryError):
        return "the memory is full: try --offload-weights, or a shorter length"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="longrope-", suffix=".log", delete=False, encoding="utf-8", errors="replace"
        ) as log:
            log.write(f"longrope {__version__}: {sys.argv[1:]}\n")
            traceback.print_exception(error, file=log)
        where = f"its traceback is in {log.name}; please report it with that file"
    except OSError:
        where = "set LONGROPE_TRACEBACK=1 to see its traceback, and please report it"
    what = shortened(first_line(error), 200)
    return f"unexpected {type(error).__name__} ({what}), a fault of longrope: {where}"


class _WithOptions(logging.Formatter):
    """Log formatter of the program: warnings name options of the verb, as errors do."""

    def __init__(self, arguments: list[str]):
        super().__init__("longrope: %(message)s")
        self._arguments = arguments

    def format(self, record: logging.LogRecord) -> str:
        return printable(_as_options(super().format(record), self._arguments))


def _stopped(arguments: list[str]) -> str:
    if arguments[0] == "evaluate" and not any(a.startswith("--out") for a in arguments):
        return "stopped; evaluate saves its progress only with --out"
    if arguments[0] == "evaluate" and any(a.startswith("--sequence-parallel") for a in arguments):
        return "stopped; evaluate saves no progress with --sequence-parallel"
    if arguments[0] not in _RESUMED:
        return "stopped"
    return "stopped; run the same command to resume"


# How library errors name a parameter: `name`, name='value' or name=True anywhere, "name is" first.
_PARAMETER = re.compile(
    r"`(\w+)`|(?<![\w./-])([a-z]\w*)=('[^']*'|\"[^\"]*\"|True\b)|^([a-z]\w*)(?= is )"
)


def _as_options(message: str, arguments: list[str]) -> str:
    """Rewrite a library error for the program: parameters become options of the running verb.

    A parameter that the verb has no option for stays as it is. ``length`` is ``--lengths`` where
    there is no ``--length``, and so on. An argument is written as in the help, such as ``MODEL``.
    """
    verb: Any = typer.main.get_command(app)
    for word in arguments[:2]:  # evaluate has verbs of its own
        verb = getattr(verb, "commands", {}).get(word, verb)
    options = {}
    for written in [parameter.opts[0] for parameter in verb.params]:
        name = written.removeprefix("--").replace("-", "_")
        options[name] = written if written != name else name.upper()

    def option(found: re.Match[str]) -> str:
        quoted, name, value, first = found.groups()
        name = quoted or name or first
        written = options.get(name) or options.get(f"{name}s")
        if written is None:
            return found[0]
        if value in (None, "True"):
            return written
        bare = value[1:-1]
        return f"{written} {value if not bare or ' ' in bare else bare}"

    return _PARAMETER.sub(option, message)


def _fail(message: str, code: int) -> None:
    _end(f"error: {' '.join(message.split())}", code)


def _end(message: str, code: int) -> None:
    with contextlib.suppress(OSError):
        if message:
            print(f"longrope: {printable(message)}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # Other ranks may be blocked in a collective, so exit without waiting for them.
    os._exit(code)
