"""Print results as tables or JSON."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console()


def print_json(value: Any) -> None:
    """Print a value as JSON to standard output."""
    print(json.dumps(value, indent=1))


def print_perplexity(rows: list[dict[str, Any]]) -> None:
    """Print a table of perplexity by length and method."""
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
    """Print a table of correct answers by length with their 95% interval."""
    from longrope.evaluate.statistics import retrieval_totals, wilson

    table = Table("length", "correct", "trials", "share", "95% interval")
    for length, (correct, trials) in retrieval_totals(rows).items():
        low, high = wilson(correct, trials)
        shares = f"{correct / trials:.0%}", f"{low:.0%} – {high:.0%}"
        table.add_row(f"{length:,}", str(correct), str(trials), *shares)
    console.print(table)


def print_benchmarks(rows: list[dict[str, Any]]) -> None:
    """Print a table of benchmark scores, and paired differences with their 95% interval."""
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
    """Print a table of paired differences between every two methods, the better one first."""
    if not rows:
        return
    title = "Difference in nats per token, paired by document (of one document, by blocks of it)"
    table = Table("length", "method", "against", "difference", "± s.e.", "better", title=title)
    for row in rows:
        names, mean = (row["method"], row["against"]), row["mean"]
        if mean is not None and mean > 0:
            names, mean = names[::-1], -mean
        table.add_row(
            f"{row['length']:,}",
            *names,
            _shown(mean, "+.4f"),
            _shown(row["standard_error"], ".4f"),
            "?" if row["better"] is None else "yes",
        )
    console.print(table)
    if any(row["better"] is None for row in rows):
        console.print("?: the difference is within two standard errors, so this text cannot tell")
