"""What the verbs print: tables for people, JSON for programs."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console()


def print_json(value: Any) -> None:
    """JSON to standard output."""
    print(json.dumps(value, indent=1))


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Perplexities by length and method."""
    table = Table("length", "method", "perplexity", "± s.e.", "tail", "tokens", "windows")
    for row in rows:
        table.add_row(
            f"{row['length']:,}",
            row["method"],
            _shown(row["perplexity"], ".3f"),
            _shown(row["standard_error"], ".3f"),
            _shown(row.get("tail_perplexity"), ".3f"),
            f"{row['tokens']:,}",
            str(row["windows"]),
        )
    console.print(table)


def print_retrieval(rows: Any) -> None:
    """Right answers by length, with their interval."""
    from longrope.evaluate.statistics import totals, wilson

    table = Table("length", "right", "of", "share", "95% interval")
    for length, (right, trials) in totals(rows).items():
        low, high = wilson(right, trials)
        shares = f"{right / trials:.0%}", f"{low:.0%} – {high:.0%}"
        table.add_row(f"{length:,}", str(right), str(trials), *shares)
    console.print(table)


def print_benchmarks(rows: list[dict[str, Any]]) -> None:
    """Shares of right answers, and the paired difference with its interval."""
    table = Table("benchmark", "questions", "original", "extended", "difference", "95% interval")
    for row in rows:
        table.add_row(
            row["task"],
            str(row["questions"]),
            f"{row['original']:.1%}",
            f"{row['extended']:.1%}",
            f"{row['difference']:+.1%}",
            f"{row['low']:+.1%} … {row['high']:+.1%}",
        )
    console.print(table)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def print_differences(rows: list[dict[str, Any]]) -> None:
    """Paired differences between the subject and every other."""
    if not rows:
        return
    title = f"{rows[0]['method']} less each other, nats per token, paired by document"
    table = Table("length", "against", "difference", "± s.e.", "better", title=title)
    for row in rows:
        table.add_row(
            f"{row['length']:,}",
            row["against"],
            _shown(row["mean"], "+.4f"),
            _shown(row["standard_error"], ".4f"),
            "yes" if row["better"] else "no",
        )
    console.print(table)
