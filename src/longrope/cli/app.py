"""The `longrope` program: start a verb, and turn errors into one line and an exit code."""

import logging
import os
import re
import sys
from typing import Any

import typer

from longrope.errors import RankLost

app = typer.Typer(
    name="longrope",
    help="Extend the context window of any RoPE language model.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
_RESUMED = ("extend", "search", "compare", "evaluate")
# click's class; some versions of typer ship their own copy
_UsageError: Any = typer.BadParameter.__base__


def main() -> None:
    """Run the program. A user's mistake prints one line to stderr and exits with code 2."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("longrope: %(message)s"))
    logging.getLogger("longrope").addHandler(handler)
    arguments = sys.argv[1:] or ["--help"]
    if os.environ.get("LONGROPE_TRACEBACK"):
        app(arguments)
    code = 0
    try:
        code = app(arguments, standalone_mode=False)
    except _UsageError as error:
        _fail(error.format_message(), 2)
    except ValueError as error:
        _fail(_as_options(str(error), arguments), 2)
    except KeyboardInterrupt:
        _fail(_stopped(arguments), 130)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":
            _fail(
                "the GPU is out of memory; try --offload-activations cpu, or a smaller --chunk", 1
            )
        raise
    except RankLost as error:
        _fail(str(error), 1)
    if code == 130:  # typer's exit code for Ctrl-C
        _fail(_stopped(arguments), code)
    sys.exit(code)


def _stopped(arguments: list[str]) -> str:
    if arguments[0] == "evaluate" and not any(a.startswith("--out") for a in arguments):
        return "stopped; evaluate saves its progress only with --out"
    if arguments[0] == "evaluate" and any(a.startswith("--sequence-parallel") for a in arguments):
        return "stopped; evaluate saves no progress with --sequence-parallel"
    if arguments[0] not in _RESUMED:
        return "stopped"
    return "stopped; run the same command to resume"


def _as_options(message: str, arguments: list[str]) -> str:
    """Write the parameters that a library error names as options of the verb."""
    commands = getattr(typer.main.get_command(app), "commands", {})
    verb = commands.get(arguments[0])
    flags = [p.opts[0] for p in verb.params if p.opts[0][:2] == "--"] if verb else []
    options = {flag[2:].replace("-", "_"): flag for flag in flags}

    def option(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        if name not in options:
            return found[0]
        return f"{options[name]} {value}" if value else options[name]

    message = re.sub(r"\b(?P<name>[a-z]\w*)='(?P<value>\w+)'", option, message)
    message = re.sub(r"^(?P<name>[a-z]\w*)(?P<value>)(?= is )", option, message)
    return re.sub(r"\b(?<=give )(?P<name>[a-z]\w*_\w+)(?P<value>)\b", option, message)


def _fail(message: str, code: int) -> None:
    print("longrope: error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    # Other ranks may be blocked in a collective, so exit without waiting for them.
    sys.stdout.flush()
    os._exit(code)
