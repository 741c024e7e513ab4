"""The quickstart notebook, executed as a program."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs/tutorials/quickstart.ipynb"
CELLS = [
    "".join(cell["source"])
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code"
]
CHECK = 'assert perplexity["search"] < perplexity["none"]'


def test_notebook_has_no_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    compile("\n".join(CELLS), str(NOTEBOOK), "exec")


@pytest.mark.slow
def test_notebook_runs(tmp_path):
    code = "\n".join([*CELLS, CHECK])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/notebook/rescale.json").exists()
