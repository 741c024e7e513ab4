"""Content of a run's report: the headline and the sections."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from longrope.evaluate.statistics import retrieval_totals, wilson
from longrope.files import read_lines
from longrope.labels import RESULT
from longrope.report import plots
from longrope.report.figures import known_methods
from longrope.rope.rescale import Rescale
from longrope.units import duration, gigabytes, number, percent, ratio


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure in a section of the report, with its caption and file name."""

    file: str
    caption: str
    figure: Figure
    base64: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table in a section of the report; its cells are formatted."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the report: heading, text, figures, tables and code."""

    title: str
    text: Sequence[str] = ()
    figures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    code: str = ""


def headline(results: dict[str, Any]) -> list[str]:
    """Return the headline of a report: summary lines of a run, the most important first."""
    found = {(r["method"], r["length"]): r["perplexity"] for r in results["perplexity"]}
    original, target = results["original_length"], results["target"]
    own = {length: found[m, length] for m, length in found if m == RESULT}
    base = found["none", original]
    unscaled = f"unscaled {number(found['none', target])}; " if ("none", target) in found else ""
    worst = max((own[length] or math.inf, length) for length in own)
    lines = [
        f"perplexity at {target:,} tokens: {number(own[target])} ({unscaled}original model "
        f"at {original:,}: {number(base)}, same tokens)",
        f"highest perplexity of all lengths: {number(worst[0])} at {worst[1]:,}, "
        f"{ratio(worst[0], base)} against the original model at {original:,}",
    ]
    asked = _totals(results["passkey"]).get(RESULT, {})
    if asked:
        length, (correct, trials) = min(asked.items(), key=lambda x: (x[1][0] / x[1][1], -x[0]))
        lines.append(
            f"passkey: {sum(r for r, _ in asked.values())} of "
            f"{sum(t for _, t in asked.values())} correct; lowest at {length:,}: "
            f"{correct} of {trials}"
        )
    for row in results["recovery"][:1]:
        lines.append(
            f"perplexity at {row['length']:,} tokens: {number(row['with'])} with recovery, "
            f"{number(row['without'])} without, original model {number(row['original'])}"
        )
    seconds = sum(stage["seconds"] for stage in results["stages"])
    lines.append(f"time without evaluation: {duration(seconds)}")
    return lines


def all_sections(directory: Path, results: dict[str, Any]) -> list[Section]:
    """Return the sections of the report that the run has results for."""
    sections = [
        _perplexity(results),
        *([_retrieval(results, "passkey")] if results["passkey"] else []),
        *([_retrieval(results, "needle")] if results["needle"] else []),
        _recovery(directory, results),
        _factors(directory),
        _training(directory),
        _plan(directory, results),
        _reproduce(directory, results),
    ]
    return [section for section in sections if section]


def _perplexity(results: dict[str, Any]) -> Section:
    rows = results["perplexity"]
    lengths = sorted({row["length"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = {(row["method"], row["length"]): row for row in rows}
    table = Table(
        ["perplexity", *(f"{length:,}" for length in lengths)],
        [
            [method, *(_with_error(found.get((method, length))) for length in lengths)]
            for method in methods
        ],
    )
    picture = Picture(
        "perplexity.png",
        "Perplexity against length (figure 1 of the LongRoPE paper), on the same tokens at every "
        "length. Known methods are for the target length, without training.",
        plots.perplexity_figure(rows, results["original_length"]),
    )
    return Section("Perplexity against length", figures=[picture], tables=[table])


def _retrieval(results: dict[str, Any], kind: str) -> Section:
    rows = results[kind]
    by_method = _totals(rows)
    lengths = sorted({row["length"] for row in rows})
    table = Table(
        [kind, *(f"{length:,}" for length in lengths)],
        [
            [method, *(_share(asked.get(length)) for length in lengths)]
            for method, asked in by_method.items()
        ],
    )
    own = [row for row in rows if row["method"] == RESULT]
    picture = Picture(
        f"{kind}.png",
        f"{kind.capitalize()} by length and depth: share of correct answers under the searched "
        "factors.",
        plots.retrieval_figure(own, kind),
    )
    text = ["Correct answers of all trials, with stratified depths and the 95% interval (Wilson)."]
    return Section(f"{kind.capitalize()} retrieval", text, [picture], [table])


def _recovery(directory: Path, results: dict[str, Any]) -> Section | None:
    benchmarks = _benchmarks(results)
    if not results["recovery"]:
        return Section("Standard benchmarks", tables=benchmarks) if benchmarks else None
    table = Table(
        ["perplexity at", "original", "without recovery", "with recovery", "change from original"],
        [
            [
                f"{row['length']:,}",
                *(number(row[key]) for key in ("original", "without", "with")),
                ratio(row["with"], row["original"]),
            ]
            for row in results["recovery"]
        ],
    )
    text = [
        f"Short factors apply up to {results['recovery_length']:,} tokens. A checkpoint has one "
        f"attention factor for both sets: {results['attention_factor']:.4g}."
    ]
    file = directory / "recovery" / "done.json"
    if file.exists():
        record = json.loads(file.read_text(encoding="utf-8"))
        for length, starts in record["starts"].items():
            won = min(starts, key=starts.get)
            text.append(
                f"Searched at {int(length):,} tokens. Loss of each starting point, the lowest "
                f"“{won}”: {_losses(starts)}."
            )
        text.append(
            f"With their own attention factor ({record['free_attention_factor']:g}), the short "
            f"factors' loss would be {record['free']:.4f} instead of {record['shared']:.4f}. Only "
            "longrope's own runtime can apply it."
        )
    return Section("Short context", text, tables=[table, *benchmarks])


def _benchmarks(results: dict[str, Any]) -> list[Table]:
    rows = results.get("benchmarks", [])  # missing in runs of older versions
    if not rows:
        return []
    header = ["benchmark", "questions", "original", "without recovery", "with recovery"]
    header.append("difference from original, 95% interval")
    return [
        Table(
            header,
            [
                [
                    row["task"],
                    f"{row['questions']:,}",
                    *(f"{row[key]:.1%}" for key in ("original", "without", "with")),
                    f"{percent(row['difference'])} "
                    f"({percent(row['low'])} to {percent(row['high'])})",
                ]
                for row in rows
            ],
        )
    ]


def _factors(directory: Path) -> Section:
    long, short = (Rescale.load(directory / f"{name}.json") for name in ("rescale", "short"))
    known = known_methods(long)
    del known["dynamic-ntk"]  # equal to NTK at the target
    searched = directory / "search" / "rescale.json"
    shown = known | {"long": long, "short": short}
    if searched.exists():
        trained = (directory / "finetune").exists()
        shown["trained with" if trained else "long"] = Rescale.load(searched)
    picture = Picture(
        "factors.png",
        "Factors by dimension (figure 2 of the LongRoPE paper).",
        plots.factors_figure(shown),
    )
    return Section("Factors", figures=[picture])


def _training(directory: Path) -> Section | None:
    pictures = []
    for name in ("through-finetune", "finetune", "final-finetune"):
        if lines := read_lines(directory / name / "loss.jsonl"):
            caption = f"Loss of every training step: {name.replace('-', ' ')}."
            pictures.append(Picture(f"loss-{name}.png", caption, plots.loss_figure(lines)))
    for name in ("search", "second-search"):
        history = [x for x in read_lines(directory / name / "history.jsonl") if x.get("loss")]
        if any("window" not in line for line in history):
            caption = f"Every candidate of the {name.replace('-', ' ')}."
            pictures.append(Picture(f"{name}.png", caption, plots.history_figure(history)))
    return Section("Searches and training", figures=pictures) if pictures else None


def _plan(directory: Path, results: dict[str, Any]) -> Section:
    taken = {stage["name"]: stage for stage in results["stages"]}
    evaluated = directory / "evaluate" / "done.json"  # written after results.json
    if evaluated.exists():
        taken["evaluate"] = json.loads(evaluated.read_text(encoding="utf-8"))
    planned = {
        stage["name"]: stage for stage in results.get("plan", [])
    }  # missing in runs of older versions
    rows = []
    for name in planned or taken:
        plan, found = planned.get(name), taken.get(name)
        before, after = [""] * 4, [""] * 3
        if plan:
            flops, memory = plan["flops"], plan["memory"]
            before = [f"{plan['length']:,}", f"{plan['tokens']:,}", f"{flops:.2g}" if flops else ""]
            before.append(gigabytes(memory) if memory else "")
        if found:
            after = [duration(found["seconds"]), f"{found['forwards']:,}", f"{found['tokens']:,}"]
        rows.append([name, *before, *after])
    header = ["stage", "length", "tokens", "FLOPs", "memory"]
    header += ["time", "forward passes", "tokens used"]
    text = [
        "The plan of each stage, the time it took, and what it used. An interrupted stage counts "
        "the time since its last start. Searches and training count what they computed, other "
        "stages an upper bound."
    ]
    return Section("Plan and cost", text, tables=[Table(header, rows)])


def _reproduce(directory: Path, results: dict[str, Any]) -> Section:
    recipe = (directory / "recipe.yaml").read_text(encoding="utf-8")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    code = "longrope extend --recipe recipe.yaml --out RUN\n\n# recipe.yaml\n" + yaml.safe_dump(
        yaml.safe_load(recipe), sort_keys=False
    )
    return Section("Reproduce", [f"{versions}. The recipe with every key resolved:"], code=code)


def _totals(rows: Sequence[dict[str, Any]]) -> dict[str, dict[int, tuple[int, int]]]:
    """Return (correct answers, trials) by method and length, for a section on retrieval."""
    methods = dict.fromkeys(row["method"] for row in rows)
    return {
        name: retrieval_totals(row for row in rows if row["method"] == name) for name in methods
    }


def _share(asked: tuple[int, int] | None) -> str:
    if asked is None:
        return ""
    low, high = wilson(*asked)
    return f"{asked[0]}/{asked[1]} ({low:.0%}–{high:.0%})"


def _with_error(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    error = row["standard_error"]
    return number(row["perplexity"]) + ("" if error is None else f" ± {error:.2f}")


def _losses(starts: dict[str, float]) -> str:
    return ", ".join(f"{name} {loss:.4f}" for name, loss in starts.items())
