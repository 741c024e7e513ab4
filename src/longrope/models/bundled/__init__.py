"""The small Llama model that is shipped with the package."""

from pathlib import Path

BUNDLED = Path(__file__).parent
