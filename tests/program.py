"""The program as a user runs it: a process of its own, and what it prints."""

import json
import subprocess
import sys
from pathlib import Path

LONGROPE = [sys.executable, "-m", "longrope"]


def run(*arguments, launcher=LONGROPE, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*launcher, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options
    )


def succeeds(*arguments, **options) -> str:
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(*arguments, **options) -> str:
    """The one line that a user's mistake prints."""
    done = run(*arguments, **options)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("longrope: error: ")
    return line


def each_refused(*mistakes) -> list[str]:
    """The lines of many such mistakes, each in a fork of one program that has imported all."""
    code = (
        "import json, os, sys, longrope.pipeline.extend\n"
        "from longrope.cli import main\n"
        "for arguments in json.load(sys.stdin):\n"
        "    if not os.fork():\n"
        "        sys.argv[1:] = arguments\n"
        "        main()\n"
        "    assert os.waitstatus_to_exitcode(os.wait()[1]) == 2, arguments\n"
    )
    asked = json.dumps([[str(a) for a in arguments] for arguments in mistakes])
    done = run("-c", code, launcher=[sys.executable], input=asked)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(mistakes)
    assert all(line.startswith("longrope: error: ") for line in lines)
    return lines


def history(out: Path) -> list:
    """The evaluations of a search."""
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
