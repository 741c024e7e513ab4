"""The command line: each verb reads its options, calls one function, prints.

Nothing heavy is imported before a verb runs, so that ``--help`` is instant.
"""

from longrope.cli import comparing, exporting, extending, measuring, searching
from longrope.cli.app import app, main

__all__ = ["app", "comparing", "exporting", "extending", "main", "measuring", "searching"]
