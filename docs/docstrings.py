"""Griffe extension: read the docstrings of longrope as Markdown."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|mod|meth|attr):`~?([^`]+)`")


class Docstrings(griffe.Extension):
    """Turn Sphinx roles into code, and ``Example:`` into the section that griffe knows."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.is_alias or not obj.docstring:
            return
        text = _ROLE.sub(r"`\1`", obj.docstring.value)
        obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
