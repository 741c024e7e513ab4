"""The version of longrope."""

__version__ = "0.1.0"
