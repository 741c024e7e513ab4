"""Plots of factors, perplexity, retrieval, training loss and search history."""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from longrope.files import write_atomically
from longrope.rope.rescale import Rescale

matplotlib.use("agg")

_SEARCHED = "#c0392b"
# Colors of rescale files, in turn; methods have fixed ones.
_FILE_COLORS = [_SEARCHED, "#e67e22", "#c71585", "#8b4513", "#000000"]
_COLORS = {
    "none": "#7f8c8d",
    "pi": "#2980b9",
    "ntk": "#27ae60",
    "dynamic-ntk": "#16a085",
    "yarn": "#8e44ad",
}


def factors_figure(rescales: Mapping[str, Rescale]) -> Figure:
    """Plot factors against dimension (figure 2 of the LongRoPE paper)."""
    figure, axes = _figure()
    for name, rescale in rescales.items():
        axes.plot(range(rescale.rotated), rescale.factors[: rescale.rotated], **_style(name))
    axes.set(xlabel="pair of rotary dimensions", ylabel="factor λ", yscale="log")
    axes.set_title("Rescale factors")
    return _finished(figure, axes)


def perplexity_figure(rows: Sequence[Mapping[str, Any]], original: int) -> Figure:
    """Plot perplexity against length with standard errors (figure 1 of the LongRoPE paper)."""
    figure, axes = _figure()
    for name in dict.fromkeys(row["method"] for row in rows):
        own = sorted((r for r in rows if r["method"] == name), key=lambda r: r["length"])
        axes.errorbar(
            [r["length"] for r in own],
            [math.nan if r["perplexity"] is None else r["perplexity"] for r in own],
            yerr=[r["standard_error"] or 0 for r in own],
            marker="o",
            markersize=4,
            capsize=2,
            **_style(name),
        )
    axes.set(xlabel="tokens in the window", ylabel="perplexity", yscale="log")
    axes.set_title("Perplexity against length, on the same tokens")
    _mark_original(axes, original, [row["length"] for row in rows])
    return _finished(figure, axes)


def position_figure(rows: Sequence[Mapping[str, Any]], original: int) -> Figure:
    """Plot perplexity by position in the longest windows."""
    longest = max(row["length"] for row in rows)
    figure, axes = _figure()
    for row in rows:
        if row["length"] == longest:
            middles = [(first + end) / 2 for first, end, _ in row["buckets"]]
            axes.plot(
                middles,
                [math.nan if value is None else value for *_, value in row["buckets"]],
                **_style(row["method"]),
            )
    axes.set(xlabel="position in the window", ylabel="perplexity", yscale="log")
    axes.set_title(f"Perplexity by position, windows of {longest:,} tokens")
    axes.axvline(original, color="black", linestyle=":", linewidth=1)
    return _finished(figure, axes)


def history_figure(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot a search's candidates by perplexity, the best so far, and the starting points.

    Of the ramps among the starting points, only the best is shown.
    """
    figure, axes = _figure()
    spent = list(itertools.accumulate(line.get("forwards", 1.0) for line in history))
    whole = [
        (forwards, line)
        for forwards, line in zip(spent, history, strict=True)
        if line["loss"] is not None and "window" not in line
    ]
    numbers, finite = [forwards for forwards, _ in whole], [line for _, line in whole]
    perplexities = [math.exp(line["loss"]) for line in finite]
    best = [min(perplexities[: i + 1]) for i in range(len(perplexities))]
    axes.plot(numbers, perplexities, ".", color="#bdc3c7", markersize=3, label="candidates")
    axes.plot(numbers, best, color=_SEARCHED, label="best so far")
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
    axes.set_title("Search history")
    return _finished(figure, axes)


def loss_figure(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the loss of every training step and its running mean."""
    figure, axes = _figure()
    losses = [line["loss"] for line in lines]
    steps = [line["step"] for line in lines]
    width = max(1, len(losses) // 10)
    means = [
        sum(losses[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(losses))
    ]
    axes.plot(steps, losses, color="#bdc3c7", linewidth=1, label="step")
    axes.plot(steps, means, color=_SEARCHED, label=f"mean of {width} steps")
    axes.set(xlabel="steps", ylabel="training loss, nats per token")
    axes.set_title("Fine-tuning")
    return _finished(figure, axes)


def retrieval_figure(rows: Sequence[Mapping[str, Any]], kind: str) -> Figure:
    """Plot the share of correct answers by length and depth; grey marks no trials."""
    lengths = sorted({row["length"] for row in rows})
    bins = max(sum(row["length"] == length for row in rows) for length in lengths)
    shares = [[math.nan] * len(lengths) for _ in range(bins)]
    for row in rows:
        # A length with fewer trials has fewer, wider ranges of depths.
        own = sum(other["length"] == row["length"] for other in rows)
        low, high = row["depth"] - 0.5 / own, row["depth"] + 0.5 / own
        for bin_ in range(round(low * bins), round(high * bins)):
            if row["trials"]:
                shares[bin_][lengths.index(row["length"])] = row["correct"] / row["trials"]
    figure, axes = _figure()
    colors = plt.get_cmap("RdYlGn").with_extremes(bad="#d0d3d6")
    image = axes.imshow(shares, cmap=colors, vmin=0, vmax=1, aspect="auto", origin="upper")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
    axes.set_yticks([-0.5, bins / 2 - 0.5, bins - 0.5], ["start", "middle", "end"])
    axes.set(xlabel="tokens", ylabel="depth in the text")
    axes.set_title(f"{kind.capitalize()}: share of correct answers")
    figure.colorbar(image, ax=axes)
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Save a plot as PNG atomically, close its figure, and return the path."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    plt.close(figure)
    write_atomically(path, buffer.getvalue())
    return path


def _figure() -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    axes.set_prop_cycle(color=_FILE_COLORS)
    return figure, axes


def _finished(figure: Figure, axes: Axes) -> Figure:
    axes.grid(alpha=0.25)
    # A legend below keeps the plot's width on a narrow screen.
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    return figure


def _style(name: str) -> dict[str, Any]:
    """Return a plot's line style: one color per method, dashed for its own attention factor."""
    method, _, own_factor = name.partition(" ")
    color = _COLORS.get(method)
    if not color:  # a file: every search writes a rescale.json, so name the directory
        path = Path(name)
        label = path.stem if path.parent.name == "" else f"{path.parent.name}/{path.stem}"
        return {"label": label, "linewidth": 2.2}
    label = f"{method}, {own_factor[1:-1]}" if own_factor else method
    return {
        "label": label.replace("attention factor", "a.f."),
        "color": color,
        "linewidth": 1.4,
        "linestyle": "--" if own_factor else "-",
    }


def _mark_original(axes: Axes, original: int, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(lengths)), [f"{length:,}" for length in sorted(set(lengths))])
    axes.axvline(original, color="black", linestyle=":", linewidth=1)
