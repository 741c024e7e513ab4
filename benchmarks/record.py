"""What a benchmark writes down: its rows, with the machine, the versions and the whole config."""

import datetime
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from longrope.files.atomic import write_atomically

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The processor or GPU, cores in use, and the versions that decide a figure."""
    name = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        kinds = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        flags = [kind for kind in kinds if kind in fields.get("flags", "").split()]
        name = f"{fields.get('model name', name)} ({', '.join(flags)})"
    packages = ("torch", "transformers", "numpy", "longrope")
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def write(name: str, config: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write ``benchmarks/results/DATE-NAME.json``; of paths in the config their last part.

    Another config of the same day gets a number behind its name; the same one is replaced.
    """
    date = datetime.date.today().isoformat()
    content = {"date": date, "machine": machine(), "config": _last_part(config), "rows": rows}
    path, number = RESULTS / f"{date}-{name}.json", 1
    while path.exists() and json.loads(path.read_text())["config"] != content["config"]:
        number += 1
        path = RESULTS / f"{date}-{name}-{number}.json"
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    return path


def _last_part(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _last_part(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_last_part(each) for each in value]
    if isinstance(value, Path) or (isinstance(value, str) and Path(value).is_absolute()):
        return Path(value).name
    return value
