"""The versions that tests/lowest.txt pins are the lowest that pyproject.toml allows."""

import re
from pathlib import Path

import pytest


def test_what_is_tried_is_what_is_promised():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    root = Path(__file__).parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = project["dependencies"] + extras["gguf"] + extras["parquet"] + extras["lora"]
    bounds = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in asked)
    pinned = dict(
        re.findall(r"^([\w-]+)==([\d.]+)$", (root / "tests/lowest.txt").read_text(), re.M)
    )
    assert bounds.keys() == pinned.keys()
    for name, version in pinned.items():
        assert f"{version}.".startswith(f"{bounds[name]}."), (name, version, bounds[name])
