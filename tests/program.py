"""The program as a user runs it: processes of their own, and what they print.

A process is forked from a server that has imported the package, so it starts in a tenth of a second
instead of five.
"""

import contextlib
import json
import multiprocessing
import os
import pkgutil
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.distributed import TCPStore

import longrope

MAIN = "from longrope.cli import main\nmain()"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        *(
            module.name
            for module in pkgutil.walk_packages(longrope.__path__, "longrope.")
            if not module.name.startswith(("longrope.__main__", "longrope.engines.query"))
        ),
        "matplotlib.pyplot",
        "transformers.models.llama.modeling_llama",
    ]
)


class Process:
    """A process of the program that may be under way; its output is in files."""

    def __init__(self, code: str, arguments: list[str], env: dict[str, str], cwd):
        self.arguments = arguments
        self._folder = tempfile.TemporaryDirectory()
        given = code, arguments, env, os.fspath(cwd or Path.cwd()), self._folder.name
        self._process = _SERVER.Process(target=_run, args=given)
        self._process.start()

    def poll(self) -> int | None:
        """The exit code, or None before the end."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(self.arguments)
        folder = Path(self._folder.name)
        printed = [(folder / name).read_text() for name in ("stdout", "stderr")]
        done = subprocess.CompletedProcess(self.arguments, self._process.exitcode, *printed)
        self._process.close()
        self._folder.cleanup()
        return done

    def kill(self) -> subprocess.CompletedProcess:
        self.send_signal(signal.SIGKILL)
        return self.wait()

    def kill_when(self, ready) -> subprocess.CompletedProcess:
        """Kill it as soon as ``ready()`` is true, or let it end before that."""
        deadline = time.monotonic() + 120
        while self.poll() is None and not ready():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return self.kill()


def _run(code: str, arguments: list[str], env: dict[str, str], cwd: str, folder: str) -> None:
    """Run Python code in a forked process as if an interpreter had been started for it."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A new interpreter has seeds of its own, so what is not seeded shows.
    random.seed()
    np.random.seed()
    torch.seed()
    sys.argv[1:] = arguments
    exec(compile(code, "program", "exec"), {"__name__": "__main__"})


def start(*arguments, env=None, cwd=None, code=MAIN) -> Process:
    """Start the program, or other Python code, without waiting for its end."""
    return Process(code, [*map(str, arguments)], dict(os.environ | (env or {})), cwd)


def run(*arguments, ranks=1, env=None, **options) -> subprocess.CompletedProcess:
    """Run it to its end; as ``ranks`` processes that find each other as under torchrun."""
    if ranks == 1:
        return start(*arguments, env=env, **options).wait()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "none",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    processes = []
    for rank in range(ranks):
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(start(*arguments, env=(env or {}) | own, **options))
    while not any(codes := [process.poll() for process in processes]) and None in codes:
        time.sleep(0.01)
    if any(codes):  # torchrun ends the others when it sees that one failed
        time.sleep(0.5)
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    ended = [process.wait() for process in processes]
    code = next((done.returncode for done in ended if done.returncode), 0)
    printed = ["".join(getattr(done, name) for done in ended) for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(ended[0].args, code, *printed)


def succeeds(*arguments, **options) -> str:
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def refused(*arguments, **options) -> str:
    """The one line that a user's mistake prints."""
    done = run(*arguments, **options)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    # On a slow machine it may have said first what it does.
    (line,) = [line for line in done.stderr.strip().splitlines() if not line.endswith(" …")]
    assert line.startswith("longrope: error: ")
    return line


def each_refused(*mistakes) -> list[str]:
    return [refused(*arguments) for arguments in mistakes]


def interpreter(*arguments, env=None, **options) -> subprocess.CompletedProcess:
    """Run a new Python interpreter, for what a forked process cannot show."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | (env or {}),
        **options,
    )


def lines(file: Path) -> int:
    """How many whole lines a file has that another process writes."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def history(out: Path) -> list:
    """The evaluations of a search."""
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
