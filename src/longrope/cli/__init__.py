"""The command line: each verb reads its options, calls one function, prints.

Nothing heavy is imported before a verb runs, so that ``--help`` is instant.
"""

from longrope.cli import exporting, extending, measuring, searching
from longrope.cli.app import app, main

__all__ = ["app", "exporting", "extending", "main", "measuring", "searching"]
