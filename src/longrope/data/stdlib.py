"""Source code of Python's standard library as documents.

It is text that every machine has: one document per package (its joined sources), one per large
module, and one for the language reference in ``pydoc_data``.
"""

import sys
import sysconfig
from pathlib import Path

# The names of this text as a data source → the argument of :func:`library_texts`.
SOURCES = {"python-library": False, "python-library-held-out": True}

# Held out of the bundled model's training set, for its evaluation.
HELD_OUT = (
    "argparse",
    "asyncio",
    "email",
    "http",
    "ipaddress",
    "logging",
    "mailbox",
    "multiprocessing",
    "statistics",
    "tarfile",
    "turtle",
    "unittest",
)

# Tables, tests, and packages that some installations lack.
_SKIPPED = {"encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "turtledemo"}
_SMALLEST_DOCUMENT = 20_000  # characters; smaller modules are too short for any length of interest


def library_texts(held_out: bool | None = None) -> dict[str, str]:
    """Return the text of each standard-library document by name, in alphabetical order.

    Args:
        held_out: True returns only the packages of :data:`HELD_OUT`, False all others, None all.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts = {}
    for name in sorted(sys.stdlib_module_names - _SKIPPED):
        if name.startswith("_sysconfigdata"):
            continue
        package, module = root / name, root / f"{name}.py"
        files = [module] if module.is_file() else sorted(package.rglob("*.py"))
        # Some installations have tests inside the packages.
        files = [f for f in files if not {"test", "tests"} & set(f.relative_to(root).parts)]
        text = "\n\n".join(f.read_text(encoding="utf-8", errors="replace") for f in files)
        if len(text) >= _SMALLEST_DOCUMENT:
            texts[name] = text
    texts["pydoc_topics"] = _topics()
    if held_out is not None:
        texts = {name: text for name, text in texts.items() if (name in HELD_OUT) == held_out}
    return dict(sorted(texts.items()))


def _topics() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
