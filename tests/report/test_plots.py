import html
import itertools
import json
import math

import pytest

from longrope.report import plots
from longrope.report.figures import draw_figures, known_methods
from longrope.rope import methods
from longrope.rope.rescale import Rescale


def yarn():
    return methods.yarn(1e4, 64, 256, 2048)


def rows(key, value):
    return [
        {"method": m, "length": n, "standard_error": None, key: value(m, n)}
        for m in ("pi", "out/rescale.json")
        for n in (256, 2048)
    ]


def test_factors_are_drawn_as_they_are():
    axes, panel = plots.factors_figure({"yarn": yarn(), "rescale": yarn()}).axes
    assert [line.get_label() for line in axes.lines] == ["yarn", "rescale"]
    assert tuple(axes.lines[0].get_ydata()) == yarn().factors
    assert set(panel.lines[0].get_ydata()) == {1.0}


def test_names_stand_at_the_ends_of_lines_and_apart():
    same = {name: yarn() for name in ("yarn", "pi", "ntk", "rescale")}
    axes, _ = plots.factors_figure(same).axes
    assert {text.get_text() for text in axes.texts} == set(same)
    places = sorted(text.get_position()[1] for text in axes.texts)
    assert all(after - before > 0.05 for before, after in itertools.pairwise(places))
    assert places[0] >= 0
    assert places[-1] <= 1


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("$\\frac{$.json", "$\\frac{$"),
        ("a$b$/_c^{.json", "a$b$/_c^{"),
        ("_searched.json", "./_searched"),
        ("<b>&.json", "<b>&"),
    ],
)
def test_names_of_files_are_no_markup(tmp_path, file, name):
    found = rows("perplexity", lambda m, n: n / 4)
    found = [row | {"method": row["method"].replace("out/rescale.json", file)} for row in found]
    for figure in (
        plots.perplexity_figure(found, 256),
        plots.position_figure([row | {"buckets": [(0, 256, 3.0)]} for row in found], 256),
        plots.factors_figure({file: yarn()}),
    ):
        assert name in {text.get_text() for text in figure.axes[0].texts}
        assert plots.save_figure(figure, tmp_path / "plot.png").exists()
        assert html.escape(name) in plots.to_svg(figure)


def test_perplexity_is_drawn_as_its_difference_from_yarn_too():
    found = [
        {"method": m, "length": n, "standard_error": None, "perplexity": p, "fine_tuned": trained}
        for m, trained, values in (
            ("yarn", False, (20.0, 30.0)),
            ("fine-tuned + yarn", True, (10.0, 10.0)),
            ("longrope", True, (9.0, 11.0)),
        )
        for n, p in zip((256, 2048), values, strict=True)
    ]
    axes, panel = plots.perplexity_figure(found, 256).axes
    assert [line.get_linestyle() for line in axes.lines if len(line.get_xdata()) == 2] >= ["--"]
    (difference,) = [line for line in panel.lines if line.get_label() == "longrope"]
    assert list(difference.get_ydata()) == pytest.approx([-10.0, 10.0])


def test_numbers_on_logarithmic_axes_are_plain():
    figure = plots.perplexity_figure(rows("perplexity", lambda m, n: n / 4), 256)
    figure.canvas.draw()
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert "100" in labels
    assert not any("$" in label for label in labels)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["256", "2k"]


def test_counts_stand_in_the_cells_and_what_was_not_asked_is_hatched():
    found = [
        {"length": 256, "depth": 0.25, "correct": 3, "trials": 5},
        {"length": 256, "depth": 0.75, "correct": 5, "trials": 5},
        {"length": 512, "depth": 0.5, "correct": 0, "trials": 0},
    ]
    axes = plots.retrieval_figure(found, "passkey").axes[0]
    assert {text.get_text() for text in axes.texts} == {"3/5", "5/5"}
    hatched = [patch for patch in axes.patches if patch.get_hatch()]
    cells = [patch for patch in axes.patches if not patch.get_hatch()]
    assert (len(hatched), len(cells)) == (1, 2)
    assert hatched[0].get_width() == 2


def test_ink_of_an_svg_is_the_page_s_color():
    svg = plots.to_svg(plots.perplexity_figure(rows("perplexity", lambda m, n: n / 4), 256))
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert plots._INK not in svg
    assert "<text" in svg  # not outlines of letters


def test_known_methods_stand_on_the_scaling_that_is_kept():
    made = Rescale((2.0, 4.0), 1e4, 64, 128, base_factors=(1.0, 3.0))
    assert known_methods(made)["pi"].factors == (2.0, 6.0)
    assert known_methods(made.replace(base_factors=()))["pi"].factors == (2.0, 2.0)


def test_perplexities_are_drawn_at_their_lengths():
    figure = plots.perplexity_figure(rows("perplexity", lambda m, n: n / 2), 256)
    (axes,) = figure.axes
    line = axes.lines[0]
    assert list(line.get_xdata()) == [256, 2048]
    assert list(line.get_ydata()) == [128, 1024]
    assert axes.get_legend_handles_labels()[1] == ["pi", "out/rescale"]


def test_positions_are_those_of_the_longest_windows():
    buckets = rows("buckets", lambda m, n: [(0, n // 2, 5.0), (n // 2, n, 7.0)])
    (axes,) = plots.position_figure(buckets, 256).axes
    assert list(axes.lines[0].get_xdata()) == [512, 1536]


def test_history_shows_the_best_so_far():
    losses = [4.0, 4.5, None, 3.9]
    history = [
        {"evaluation": i, "loss": loss, "start": "pi" if i == 0 else None}
        for i, loss in enumerate(losses)
    ]
    (axes,) = plots.history_figure(history).axes
    best = axes.lines[1]
    assert list(best.get_xdata()) == [1, 2, 4]
    assert list(best.get_ydata()) == [math.exp(4.0), math.exp(4.0), math.exp(3.9)]


def test_history_names_its_starts_and_of_ramps_the_best():
    names = ["yarn", "ramp 32-1", "ramp 8-0.5", "ramp 2-1", "shrunk to 0.75"]
    history = [
        {"evaluation": i, "loss": loss, "start": name}
        for i, (name, loss) in enumerate(zip(names, [4.0, 4.2, 3.8, 4.1, 3.9], strict=True))
    ]
    (axes,) = plots.history_figure(history).axes
    lines = {line.get_label(): line for line in axes.lines if line.get_linestyle() == "--"}
    assert list(lines) == ["yarn", "ramp 8-0.5", "shrunk to 0.75"]
    assert lines["ramp 8-0.5"].get_ydata()[0] == math.exp(3.8)
    assert len({line.get_color() for line in lines.values()}) == 3


def test_report_draws_what_is_there(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: nothing"):
        draw_figures(tmp_path)
    yarn().save(tmp_path / "rescale.json")
    assert [path.name for path in draw_figures(tmp_path)] == ["factors.png"]
    (tmp_path / "compare.json").write_text("{")
    with pytest.raises(ValueError, match=r"compare\.json: is not valid JSON"):
        draw_figures(tmp_path)
    comparison = {
        "original_length": 256,
        "perplexity": rows("perplexity", lambda m, n: 5.0),
        "by_position": rows("buckets", lambda m, n: [(0, n, 5.0)]),
    }
    (tmp_path / "compare.json").write_text(json.dumps(comparison))
    names = [path.name for path in draw_figures(tmp_path)]
    assert names == ["factors.png", "perplexity.png", "position.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in draw_figures(tmp_path))
