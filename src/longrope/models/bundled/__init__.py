"""The small Llama model in the package."""

from pathlib import Path

BUNDLED = Path(__file__).parent
