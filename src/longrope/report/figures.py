"""Draw the figures of a search or comparison directory."""

import operator
from pathlib import Path

from longrope.files.parse import content_of, read_json
from longrope.files.stores import read_lines
from longrope.report import plots
from longrope.rope.methods import METHODS
from longrope.rope.rescale import Rescale


def draw_figures(directory: Path) -> list[Path]:
    """Draw the figures of a search or comparison directory, and return the PNG files.

    Raises:
        ValueError: no search and no comparison wrote there, or a file is damaged.
    """
    figures = {}
    if (directory / "rescale.json").exists():
        rescale = Rescale.load(directory / "rescale.json")
        shown = known_methods(rescale) | {"rescale": rescale}
        if rescale.start_tokens and (directory / "portable.json").exists():
            shown["portable"] = Rescale.load(directory / "portable.json")
        figures["factors.png"] = plots.factors_figure(shown)
    file = directory / "history.jsonl"
    history = [line for line in read_lines(file) if line.get("loss")]
    if any("window" not in line for line in history):
        with content_of(file, "run the search again in another directory"):
            figures["history.png"] = plots.history_figure(history)
    if (directory / "compare.json").exists():
        file = directory / "compare.json"
        comparison = read_json(file)
        with content_of(file, "run the comparison again"):
            original = comparison["original_length"]
            rows = comparison["perplexity"]
            if len({row["length"] for row in rows}) > 1:
                figures["perplexity.png"] = plots.perplexity_figure(rows, original)
            figures["position.png"] = plots.position_figure(comparison["by_position"], original)
    if not figures:
        raise ValueError(
            f"{directory}: nothing to draw; give a directory that 'longrope search' or "
            "'longrope compare' wrote to"
        )
    return [plots.save_figure(figure, directory / name) for name, figure in figures.items()]


def known_methods(rescale: Rescale) -> dict[str, Rescale]:
    """Return the known methods' factors to draw beside a rescale, for its model and target."""
    rescales = {
        name: METHODS[name](
            rescale.rope_theta,
            rescale.rotary_dim,
            rescale.original_max_position_embeddings,
            rescale.max_position_embeddings,
        )
        for name in ("pi", "ntk", "dynamic-ntk", "yarn")
    }
    base = rescale.base_factors
    if base:
        rescales = {
            name: known.replace(factors=tuple(map(operator.mul, known.factors, base)))
            for name, known in rescales.items()
        }
    return rescales
