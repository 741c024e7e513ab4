"""The README's commands, as they stand there."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_commands_and_code_run(tmp_path):
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert sum(line.startswith("longrope ") for line in commands) == 2
    for line in commands:
        if line.startswith("longrope "):
            done = subprocess.run(
                [sys.executable, "-m", *shlex.split(line)],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=900,
            )
            assert done.returncode == 0, done.stderr
    assert "yes" in done.stdout  # the searched factors are better than something
    (code,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("<|bos|>import os")


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_verb_is_described():
    assert shutil.which("longrope")
    listed = subprocess.run(["longrope", "--help"], capture_output=True, text=True).stdout
    for verb in re.findall(r"^│ (\w+) ", listed, re.MULTILINE):
        assert f"`longrope {verb}" in README, verb
