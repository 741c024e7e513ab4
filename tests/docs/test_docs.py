"""The documentation: navigation, links, generated pages, and the code in how-to pages."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import longrope
from longrope.cli.app import _VERBS
from longrope.pipeline.recipe import Recipe

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
HOW_TO = sorted((DOCS / "how-to").glob("*.md"))
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nav(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
        return
    for inner in entry.values() if isinstance(entry, dict) else entry:
        yield from nav(inner)


def test_every_page_is_in_the_navigation():
    pages = list(nav(CONFIG["nav"]))
    assert sorted(pages) == [page.relative_to(DOCS).as_posix() for page in PAGES]
    parts = [next(iter(part)) for part in CONFIG["nav"]]
    assert parts[1:] == ["Tutorials", "How-to", "Reference", "Explanation", "Development"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_command_line_page_names_every_verb_and_option(hooks):
    page = hooks.cli_reference()
    headings = re.findall(r"^## longrope (.*)$", page, flags=re.MULTILINE)
    measures = ["perplexity", "passkey", "needle", "benchmarks"]
    expected = [
        name
        for verb in _VERBS
        for name in ([f"evaluate {m}" for m in measures] if verb == "evaluate" else [verb])
    ]
    assert headings == expected
    for option in ("--rope-scaling", "--eval-data", "--long-factors", "--engine-python"):
        assert f"`{option}`" in page
    assert "`quick` `standard` `paper`" in page
    for name, verb in hooks.verbs():
        assert f"longrope {name} " in page
        assert verb.epilog, name


def test_configuration_page_names_and_describes_every_key(hooks):
    page = hooks.configuration_reference()
    keys = {key: text for key, _, _, text in hooks.recipe_keys()}
    everything = Recipe(target="8x").model_dump(mode="json")
    for key in leaves(everything):
        assert f"| `{key}` |" in page, key
    assert not [key for key, text in keys.items() if not text]
    assert "finetune.final.steps" in keys
    # Keys of the other algorithm are not in the dump of the default.
    assert "search.population" in keys


def leaves(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_api_page_has_every_public_name():
    page = (DOCS / "reference/api.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: longrope\.(\w+)$", page, flags=re.MULTILINE)
    assert sorted([*named, "__version__"]) == sorted(longrope.__all__)


def test_commands_and_their_options_exist(hooks):
    """Every option in a shell block of the tutorials and how-to pages is one of the verb's."""
    known = {
        name: {option for parameter in verb.params for option in parameter.opts}
        | {option for parameter in verb.params for option in parameter.secondary_opts}
        for name, verb in hooks.verbs()
    }
    for page in [*HOW_TO, *(DOCS / "tutorials").glob("*.md"), DOCS / "index.md"]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
            for command in re.findall(r"\blongrope ([a-z].*)", block):
                command = command.partition(" #")[0]
                name = next(
                    (n for n in sorted(known, key=len, reverse=True) if command.startswith(n)), None
                )
                assert name, f"{page.name}: longrope {command}"
                for option in re.findall(r"(?<!\S)--[a-z-]+", command):
                    assert option in known[name], f"{page.name}: longrope {name} {option}"


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_python_of_how_to_pages_compiles(page):
    for block in blocks(page):
        compile(block, str(page), "exec")


@pytest.mark.slow
def test_python_of_how_to_pages_runs(tmp_path):
    code = "\n".join(block for page in HOW_TO for block in blocks(page))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
