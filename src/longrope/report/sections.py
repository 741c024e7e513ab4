"""Content of a run's report: its sections."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from longrope.checkpoints.card import UNKNOWN_KEYS
from longrope.evaluate.statistics import retrieval_totals, wilson
from longrope.files.parse import read_json, read_yaml
from longrope.files.stores import read_lines
from longrope.labels import RESULT, has_extended_weights
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
    svg: str = ""


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


def all_sections(directory: Path, results: dict[str, Any]) -> list[Section]:
    """Return the sections of the report that the run has results for."""
    sections = [
        _perplexity(results),
        _other_text(results),
        *([_retrieval(results, "passkey")] if results["passkey"] else []),
        *([_retrieval(results, "needle")] if results["needle"] else []),
        _recovery(directory, results),
        _factors(directory),
        _training(directory),
        _plan(directory, results),
        _settings(directory, results),
        _loading(),
        _reproduce(directory, results),
    ]
    return [section for section in sections if section]


def _perplexity(results: dict[str, Any]) -> Section:
    rows = results["perplexity"]
    caption = (
        "Perplexity against length (figure 1 of the LongRoPE paper), on the same tokens at every "
        "length. Bars: standard error over the documents. Dotted line: the original length."
    )
    text = []
    if results.get("evaluation_documents"):  # missing in runs of older versions
        text.append(f"Held-out documents: {', '.join(results['evaluation_documents'])}.")
    if any(row.get("fine_tuned") for row in rows):
        caption += " Solid lines: fine-tuned weights. Dashed lines: the original weights."
        text.append(
            "Known methods are made for the target length. “fine-tuned + yarn” has the same "
            "fine-tuned weights under YaRN's factors: its difference from longrope is the effect "
            "of the factors, its difference from yarn that of the training. The weights were "
            "trained under longrope's factors."
        )
    picture = Picture(
        "perplexity.png", caption, plots.perplexity_figure(rows, results["original_length"])
    )
    table = _perplexity_table(rows, results)
    return Section("Perplexity against length", text, [picture], [table])


def _perplexity_table(rows: Sequence[dict[str, Any]], results: dict[str, Any]) -> Table:
    lengths = sorted({row["length"] for row in rows})
    found = {(row["method"], row["length"]): row for row in rows}
    trained = results["trained_length"] is not None
    return Table(
        ["perplexity", *(["weights"] if trained else []), *(f"{length:,}" for length in lengths)],
        [
            [
                method,
                *(["fine-tuned" if has_extended_weights(method) else "original"] * trained),
                *(_with_error(found.get((method, length))) for length in lengths),
            ]
            for method in dict.fromkeys(row["method"] for row in rows)
        ],
    )


def _other_text(results: dict[str, Any]) -> Section | None:
    rows = results.get("other_perplexity", [])
    if not rows:
        return None
    names = ", ".join(results["other_documents"])
    text = [
        f"Documents of another kind than the training text: {names}. A gain here is not an "
        "effect of the training text."
    ]
    return Section("Text of another kind", text, tables=[_perplexity_table(rows, results)])


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
    untested = {row["length"] for row in results["perplexity"]} - {row["length"] for row in own}
    own += [{"length": n, "depth": 0.5, "correct": 0, "trials": 0} for n in sorted(untested)]
    picture = Picture(
        f"{kind}.png",
        f"{kind.capitalize()} by length and depth: correct answers of the trials in each cell, "
        "under the searched factors. Hatched: not tested.",
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
        record = read_json(file)
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
            caption = f"Every candidate of the {name.replace('-', ' ')}, with the best so far."
            pictures.append(Picture(f"{name}.png", caption, plots.history_figure(history)))
    return Section("Searches and training", figures=pictures) if pictures else None


def _plan(directory: Path, results: dict[str, Any]) -> Section:
    taken = {stage["name"]: stage for stage in results["stages"]}
    evaluated = directory / "evaluate" / "done.json"  # written after results.json
    if evaluated.exists():
        taken["evaluate"] = read_json(evaluated)
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


def _settings(directory: Path, results: dict[str, Any]) -> Section | None:
    """Return the section on the settings that the effort chose."""
    file = directory / "choices.json"
    if not file.exists():
        return None
    choices = read_json(file, list[dict[str, Any]])
    if not choices:
        return None
    rows = [[choice["key"], str(choice["value"]), choice["reason"]] for choice in choices]
    table = Table(["setting", "value", "reason"], rows)
    return Section(f"Settings of effort {results['effort']}", tables=[table])


def _loading() -> Section:
    return Section("Loading the model", [UNKNOWN_KEYS.replace("`", "")])


def _reproduce(directory: Path, results: dict[str, Any]) -> Section:
    recipe = read_yaml(directory / "recipe.yaml")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    code = "longrope extend --recipe recipe.yaml --out RUN\n\n# recipe.yaml\n" + yaml.safe_dump(
        recipe, sort_keys=False
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
