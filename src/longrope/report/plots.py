"""Plots of factors, perplexity, retrieval, training loss and search history.

Colors follow the Okabe-Ito palette, which color-blind readers can tell apart. Lines carry their
names at the right end. Every figure is drawn once, and saved as PNG or as SVG whose ink follows the
page's color, so that it fits a light and a dark page.
"""

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from longrope.files.atomic import write_atomically
from longrope.labels import method_of
from longrope.rope.rescale import Rescale

matplotlib.use("agg")

_INK, _GREY = "#1d2733", "#8a94a0"
_SEARCHED = "#d55e00"
# Colors of rescale files, in turn; methods have fixed ones.
_FILE_COLORS = [_SEARCHED, "#e69f00", "#882255", "#999933", "#44aa99"]
_COLORS = {
    "none": _GREY,
    "pi": "#cc79a7",
    "ntk": "#009e73",
    "dynamic-ntk": "#56b4e9",
    "yarn": "#2f86c6",
}
_STYLE: Any = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": 11,
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "longrope",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_WIDTH, _HEIGHT, _PANEL = 5.8, 3.9, 1.7  # inches; a phone shows them at two thirds


def factors_figure(rescales: Mapping[str, Rescale]) -> Figure:
    """Plot factors against dimension (figure 2 of the LongRoPE paper).

    Below, the ratio to YaRN's factors, where it is among them.
    """
    yarn = rescales.get("yarn")
    figure, axes, panel = _figure(panel=yarn is not None)
    for name, rescale in rescales.items():
        pairs = range(rescale.rotated)
        values = rescale.factors[: rescale.rotated]
        axes.plot(pairs, values, **_line(name))
        if yarn is not None and panel is not None and name != "yarn":
            known = yarn.factors[: rescale.rotated]
            ratios = [value / base for value, base in zip(values, known, strict=True)]
            panel.plot(pairs, ratios, **_line(name))
    axes.set(ylabel="factor λ", yscale="log", title="Rescale factors")
    _plain_numbers(axes)
    _name_lines(axes)
    lowest = panel or axes
    lowest.set_xlabel("pair of rotary dimensions, fast to slow")
    if panel is not None:
        panel.axhline(1, color=_COLORS["yarn"], linewidth=1)
        panel.set_ylabel("λ / YaRN's λ")
    return figure


def perplexity_figure(rows: Sequence[Mapping[str, Any]], original: int) -> Figure:
    """Plot perplexity against length with standard errors (figure 1 of the LongRoPE paper).

    Original weights have dashed lines where there are fine-tuned ones too. Below, the difference
    from YaRN, of the fine-tuned weights if they were measured under it.
    """
    names = list(dict.fromkeys(row["method"] for row in rows))
    # The label of the fine-tuned weights is the longer one.
    reference = max((name for name in names if method_of(name) == "yarn"), key=len, default=None)
    figure, axes, panel = _figure(panel=reference is not None and len(names) > 1)
    base = {r["length"]: r["perplexity"] for r in rows if r["method"] == reference}
    mixed = any(row.get("fine_tuned") for row in rows)
    for name in names:
        own = sorted((r for r in rows if r["method"] == name), key=lambda r: r["length"])
        dashed = mixed and not own[0]["fine_tuned"]
        style: dict[str, Any] = _line(name)
        style["linestyle"] = "--" if dashed else style.get("linestyle", "-")
        axes.errorbar(
            [r["length"] for r in own],
            [math.nan if r["perplexity"] is None else r["perplexity"] for r in own],
            yerr=[r["standard_error"] or 0 for r in own],
            marker="o",
            markersize=4,
            capsize=2,
            **style,
        )
        near = [
            (r["length"], 100 * (r["perplexity"] / base[r["length"]] - 1))
            for r in own
            if r["perplexity"] and base.get(r["length"]) and name != reference
        ]
        near = [(length, percent) for length, percent in near if abs(percent) <= 40]
        if panel is not None and near:
            panel.plot(*zip(*near, strict=True), marker="o", markersize=3, **style)
    axes.set(
        ylabel="perplexity", yscale="log", title="Perplexity against length, on the same tokens"
    )
    _plain_numbers(axes)
    _token_axis(axes, original, [row["length"] for row in rows])
    _name_lines(axes)
    if panel is not None:
        color = _COLORS["yarn"]
        panel.axhline(0, color=color, linewidth=1)
        panel.set_ylabel(f"% from\n{reference}")
        _token_axis(panel, original, [row["length"] for row in rows])
    (panel or axes).set_xlabel("tokens in the window")
    return figure


def position_figure(rows: Sequence[Mapping[str, Any]], original: int) -> Figure:
    """Plot perplexity by position in the longest windows."""
    longest = max(row["length"] for row in rows)
    figure, axes, _ = _figure()
    for row in rows:
        if row["length"] == longest:
            middles = [(first + end) / 2 for first, end, _ in row["buckets"]]
            values = [math.nan if value is None else value for *_, value in row["buckets"]]
            axes.plot(middles, values, **_line(row["method"]))
    title = f"Perplexity by position, windows of {longest:,} tokens"
    axes.set(xlabel="position in the window, in tokens", ylabel="perplexity", title=title)
    axes.set_yscale("log")
    _plain_numbers(axes)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _mark(axes, original)
    _name_lines(axes)
    return figure


def history_figure(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot a search's candidates by perplexity, the best so far, and the starting points.

    Of the ramps among the starting points, only the best is shown.
    """
    figure, axes, _ = _figure()
    spent = list(itertools.accumulate(line.get("forwards", 1.0) for line in history))
    whole = [
        (forwards, line)
        for forwards, line in zip(spent, history, strict=True)
        if line["loss"] is not None and "window" not in line
    ]
    numbers, finite = [forwards for forwards, _ in whole], [line for _, line in whole]
    perplexities = [math.exp(line["loss"]) for line in finite]
    best = [min(perplexities[: i + 1]) for i in range(len(perplexities))]
    axes.plot(numbers, perplexities, "o", color=_GREY, markersize=3, label="candidates")
    axes.plot(numbers, best, color=_SEARCHED, drawstyle="steps-post", label="best so far")
    starts = {line["start"]: math.exp(line["loss"]) for line in finite if line.get("start")}
    ramps = sorted((name for name in starts if name.startswith("ramp ")), key=starts.__getitem__)
    colors = itertools.cycle(_FILE_COLORS[1:])
    for name, perplexity in starts.items():
        if name not in ramps[1:]:
            color = _COLORS.get(name) or next(colors)
            axes.axhline(perplexity, label=name, color=color, linestyle="--", linewidth=1)
    # Bad candidates and starting points lie far above the interesting range.
    low = min(best)
    middle = min(sorted(perplexities)[len(perplexities) // 2], 2 * low)
    top = max(middle, min(starts.values(), default=middle))
    axes.set_ylim(low - 0.1 * (top - low + 1e-3), top + 0.4 * (top - low + 1e-3))
    axes.set(xlabel="forward passes over all windows", ylabel="perplexity of the search windows")
    axes.set_title("Search history; dashed: starting points")
    _name_lines(axes)
    return figure


def loss_figure(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the loss of every training step and its running mean."""
    figure, axes, _ = _figure()
    losses = [line["loss"] for line in lines]
    steps = [line["step"] for line in lines]
    width = max(1, len(losses) // 10)
    means = [
        sum(losses[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(losses))
    ]
    axes.plot(steps, losses, color=_GREY, linewidth=1, alpha=0.6, label="one step")
    axes.plot(steps, means, color=_SEARCHED, label=f"mean of {width} steps")
    axes.set(xlabel="steps", ylabel="training loss, nats per token", title="Fine-tuning")
    _name_lines(axes)
    return figure


def retrieval_figure(rows: Sequence[Mapping[str, Any]], kind: str) -> Figure:
    """Plot the correct answers by length and depth; cells without trials are hatched."""
    lengths = sorted({row["length"] for row in rows})
    bins = max(sum(row["length"] == length for row in rows) for length in lengths)
    figure, axes, _ = _figure()
    colors = plt.get_cmap("cividis")
    axes.add_patch(
        Rectangle((0, 0), len(lengths), 1, facecolor="none", edgecolor=_GREY, hatch="///", lw=0)
    )
    for column, length in enumerate(lengths):
        own = [row for row in rows if row["length"] == length]
        for row in own:
            if not row["trials"]:
                continue
            share = row["correct"] / row["trials"]
            low = row["depth"] - 0.5 / len(own)
            cell = (column, low), 1, 1 / len(own)
            axes.add_patch(Rectangle(*cell, facecolor=colors(share), edgecolor="white", lw=0.5))
            axes.text(
                column + 0.5,
                row["depth"],
                f"{row['correct']}/{row['trials']}",
                color="black" if share > 0.5 else "white",
                fontsize=8 if bins <= 12 else 5,
                ha="center",
                va="center",
            )
    axes.grid(visible=False)
    axes.set(xlim=(0, len(lengths)), ylim=(1, 0))
    middles = [column + 0.5 for column in range(len(lengths))]
    axes.set_xticks(middles, [f"{length:,}" for length in lengths], rotation=45)
    axes.set_yticks([0, 0.5, 1], ["start", "middle", "end"])
    title = f"{kind.capitalize()}: correct answers of the trials"
    axes.set(xlabel="tokens in the prompt", ylabel="depth in the prompt", title=title)
    scale = plt.cm.ScalarMappable(cmap=colors)
    with plt.rc_context(_STYLE):
        figure.colorbar(scale, ax=axes, label="share of correct answers")
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Save a plot as PNG atomically, close its figure, and return the path."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    plt.close(figure)
    write_atomically(path, buffer.getvalue())
    return path


def to_svg(figure: Figure) -> str:
    """Return a plot as SVG for a page: transparent, and its ink has the page's text color."""
    buffer = io.StringIO()
    with plt.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def _figure(panel: bool = False) -> tuple[Figure, Axes, Axes | None]:
    """Return a figure, its axes, and the axes of a lower panel if one is asked for."""
    with plt.rc_context(_STYLE):
        size = (_WIDTH, _HEIGHT + _PANEL * panel)
        heights = {"height_ratios": [_HEIGHT, _PANEL]} if panel else None
        figure, found = plt.subplots(
            1 + panel,
            1,
            figsize=size,
            layout="constrained",
            sharex=True,
            squeeze=False,
            gridspec_kw=heights,
        )
    rows: list[Axes] = list(found[:, 0])
    for axes in rows:
        axes.set_prop_cycle(color=_FILE_COLORS)
        axes.grid(color=_GREY, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, rows[0], rows[1] if panel else None


def _line(name: str) -> dict[str, Any]:
    """Return a plot's line style: one color per method, dashed for its own attention factor."""
    method, _, own_factor = method_of(name).partition(" ")
    color = _COLORS.get(method)
    if not color:  # a file: every search writes a rescale.json, so name the directory
        path = Path(name)
        label = path.stem if path.parent.name == "" else f"{path.parent.name}/{path.stem}"
        if label.startswith("_"):  # matplotlib takes such labels for none
            label = f"./{label}"
        return {"label": label, "linewidth": 2.2}
    label = f"{method}, {own_factor[1:-1]}" if own_factor else name
    return {
        "label": label.replace("attention factor", "a.f."),
        "color": color,
        "linewidth": 1.4,
        "linestyle": "--" if own_factor else "-",
    }


def _plain_numbers(axes: Axes) -> None:
    """Write the numbers of a logarithmic axis in full: 60 instead of a power of ten."""
    low, high = axes.get_ylim()
    narrow = high / max(low, 1e-12) < 30
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6, 8) if narrow else (1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _token_axis(axes: Axes, original: int, lengths: Sequence[int]) -> None:
    """Give a plot a logarithmic axis of lengths, with the original length marked."""
    ticks = sorted(set(lengths))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [_short_number(length) for length in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    _mark(axes, original)


def _short_number(length: int) -> str:
    """Write a length for an axis: 131,072 as 128k."""
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else f"{length:,}"


def _mark(axes: Axes, original: int) -> None:
    """Mark the original length with a dotted line."""
    axes.axvline(original, color=_INK, linestyle=":", linewidth=1)


def _name_lines(axes: Axes) -> None:
    """Write the name of each line at its right end, in its color, none over another."""
    ends: list[tuple[float, str, Any]] = []
    axes.get_ylim()  # brings the limits, and so the transformation, up to date
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        line: Any = handle.lines[0] if isinstance(handle, ErrorbarContainer) else handle
        heights = [float(y) for y in line.get_ydata() if math.isfinite(y)]
        if heights:
            pixels = axes.transData.transform((1.0, heights[-1]))
            place = float(axes.transAxes.inverted().transform(pixels)[1])
            ends.append((place, label, line.get_color()))
    ends.sort(key=lambda end: end[0])
    gap = 0.062
    places = [min(max(end[0], 0.0), 1.0) for end in ends]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + gap)
    excess = places[-1] - 1.0 if places else 0.0
    for index in reversed(range(len(places))):  # from the top down, so that all stay inside
        limit = 1.0 - gap * (len(places) - 1 - index)
        places[index] = min(places[index], limit) if excess > 0 else places[index]
    for (_, label, color), place in zip(ends, places, strict=True):
        name = axes.text(
            1.015, place, label, color=color, fontsize=9, va="center", transform=axes.transAxes
        )
        name.set_parse_math(False)  # a file's name may have a $
