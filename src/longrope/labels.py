"""Names of models and of rows in tables, plots and `results.json`."""

import re
from pathlib import Path

RESULT, WITHOUT = "longrope", "longrope without recovery"
_FINE_TUNED = "fine-tuned + "


def fine_tuned(method: str) -> str:
    """Return the label of the fine-tuned weights under a known method."""
    return _FINE_TUNED + method


def method_of(label: str) -> str:
    """Return the known method in a row's label, with fine-tuned weights or the original ones."""
    return label.removeprefix(_FINE_TUNED)


def has_extended_weights(label: str) -> bool:
    """Return whether a row is measured on the extended model's weights."""
    return label in (RESULT, WITHOUT) or label.startswith(_FINE_TUNED)


def display_name(source: str) -> str:
    """Return the name of a model for titles and cards: a hub id, or a local path's last part."""
    path = Path(source)
    return path.resolve().name if path.exists() else source


def as_markdown(text: str) -> str:
    """Return Markdown that shows a text as it is: in one line, its special characters escaped."""
    # An underscore within a word, as in the name of a task, is no markup.
    special = r"([\\`*\[\]<>|~$#&]|(?<![^\W_])_|_(?![^\W_]))"
    return re.sub(special, r"\\\1", " ".join(text.split()))
