"""Print results as tables or JSON."""

import json
import math
from typing import Any

from rich.table import Column, Table

from longrope.progress import plain_console

console = plain_console(stderr=False)


def print_json(value: Any) -> None:
    """Print a value as JSON to standard output."""
    print(json.dumps(value, indent=1))


def print_perplexity(rows: list[dict[str, Any]]) -> None:
    """Print a table of perplexity by length and method, the best first."""
    name = Column("method", overflow="fold")
    table = Table("length", name, "perplexity", "± s.e.", "tail", "tokens", "windows")
    for row in sorted(rows, key=lambda row: (row["length"], row["perplexity"] or math.inf)):
        table.add_row(
            f"{row['length']:,}",
            row["method"],
            _shown(row["perplexity"], ".3f") or "not finite",
            _shown(row["standard_error"], ".3f"),
            _shown(row.get("tail_perplexity"), ".3f"),
            f"{row['tokens']:,}",
            str(row["windows"]),
        )
    console.print(table)
    if any(row["perplexity"] is None for row in rows):
        console.print(
            "not finite: numbers of the model overflow; try --dtype float32", soft_wrap=True
        )


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
    names = [Column(head, overflow="fold") for head in ("method", "against")]
    table = Table("length", *names, "difference", "± s.e.", "better", title=title)
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
        console.print("?: within two standard errors, or without one: this text cannot tell")
    if any("(attention factor" in row["method"] + row["against"] for row in rows):
        console.print(
            "Rows with “(attention factor …)” have the method's own. All other rows share one, so "
            "that they differ in their factors alone.",
            soft_wrap=True,
        )
    console.print(_best(rows), soft_wrap=True)


def _best(rows: list[dict[str, Any]]) -> str:
    """Return the best method at the longest length, and against which others this is certain."""
    longest = max(row["length"] for row in rows)
    rows = [row for row in rows if row["length"] == longest and row["mean"] is not None]
    names = dict.fromkeys(name for row in rows for name in (row["method"], row["against"]))
    if not names:
        return f"No method has a finite perplexity at {longest:,} tokens."
    behind = {
        name: sum(
            (row["mean"] > 0) if row["method"] == name else (row["mean"] < 0)
            for row in rows
            if name in (row["method"], row["against"])
        )
        for name in names
    }
    best = min(names, key=behind.__getitem__)
    unsure = [
        row["against"] if row["method"] == best else row["method"]
        for row in rows
        if best in (row["method"], row["against"]) and row["better"] is None
    ]
    sure = f"not certain against {', '.join(unsure)}" if unsure else "certain against all others"
    return f"Best at {longest:,} tokens of this text: {best}; {sure}."
