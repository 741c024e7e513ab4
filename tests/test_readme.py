"""The README's commands, as they stand there."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.timeout(3600)  # half an hour on a slow machine
@pytest.mark.slow
def test_commands_and_code_run(tmp_path):
    commands = [line for block in blocks("bash") for line in re.split(r"&&|\n", block)]
    commands = [line.strip().removesuffix("\\").strip() for line in commands]
    assert sum(line.startswith("longrope ") for line in commands) == 3
    for line in commands:
        if line.startswith("longrope "):
            done = subprocess.run(
                [sys.executable, "-m", *shlex.split(line)],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=1800,
            )
            assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "runs/first/compare.json").read_text())["differences"]
    searched = [row for row in rows if row["method"].endswith("rescale.json")]
    against = {row["against"]: row["better"] for row in searched}
    assert against.keys() >= {"none", "pi", "ntk", "dynamic-ntk", "yarn"}
    assert all(against.values())
    printed = [_python(code, tmp_path).splitlines() for code in blocks("python")]
    assert [lines[0].startswith(("<|bos|>import os", "import os")) for lines in printed] == [
        True
    ] * 2
    yarn, searched = map(float, printed[0][-2:])  # on documents that were not searched on
    assert searched < yarn


def _python(code: str, directory: Path) -> str:
    """Run an example in the directory where the commands ran, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=directory, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 150


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_verb_is_described():
    from longrope.cli import app

    groups = [(app, ""), (app.registered_groups[0].typer_instance, "evaluate ")]
    verbs = [
        before + (command.name or command.callback.__name__)
        for group, before in groups
        for command in group.registered_commands
    ]
    assert len(verbs) == 15
    for verb in verbs:
        assert f"`longrope {verb}" in README, verb
