"""The command line: each verb reads its options, calls one function and prints.

Nothing heavy is imported before a verb runs, so ``--help`` is instant.
"""

from longrope.cli import compare, evaluate, export, extend, search
from longrope.cli.app import app, main

__all__ = ["app", "compare", "evaluate", "export", "extend", "main", "search"]
