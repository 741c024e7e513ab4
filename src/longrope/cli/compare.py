"""The verbs ``compare`` and ``report``."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from longrope.cli.app import app
from longrope.cli.options import (
    EXECUTION,
    SCALING,
    Data,
    Field,
    Json,
    Model,
    Pack,
    add_options,
    examples,
    option_name,
)
from longrope.cli.tables import console, print_differences, print_json, print_perplexity
from longrope.evaluate.settings import PerplexityConfig
from longrope.execution import ExecutionConfig


@app.command(
    epilog=examples(
        "longrope compare bundled --target 8x --data python-library-held-out",
        "longrope compare --target 8x --data books/ --methods yarn,first/rescale.json",
    )
)
@add_options("scoring", {"": PerplexityConfig}, leave_out=("lengths", "stride"))
@add_options("scaling", SCALING)
@add_options("execution", EXECUTION, leave_out=("sequence_parallel",))
def compare(
    *,
    model: Model = "bundled",
    target: Annotated[
        str, typer.Option(help="Target length of the methods, in tokens or such as 8x.")
    ],
    methods: Annotated[
        str, typer.Option(help="Comma-separated methods and rescale files.")
    ] = "none,pi,ntk,dynamic-ntk,yarn",
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated lengths in tokens, such as 512,1024; by default the target."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory for compare.json and the plots; by default that of the first rescale "
            "file, else compare/."
        ),
    ] = None,
    data: Data,
    field: Field = "text",
    pack: Pack = False,
    scoring: dict[str, Any],
    attention_factor: Annotated[
        float | None,
        typer.Option(help="One attention factor for every method (not for rescale files)."),
    ] = None,
    execution: dict[str, Any],
    scaling: dict[str, Any],
    json_: Json = False,
) -> None:
    """Compare methods and searched factors on held-out documents, and print the table.

    The same command resumes an interrupted comparison.
    """
    from longrope.data.documents import check_sources
    from longrope.distributed import Ranks, require_one_process
    from longrope.evaluate import compare as comparing
    from longrope.evaluate.cache import measurement_cache
    from longrope.files.atomic import require_directory
    from longrope.models.info import ModelInfo, inspect_model
    from longrope.models.load import load_model
    from longrope.pipeline.checks import check_evaluation
    from longrope.report.figures import draw_figures as write_report
    from longrope.rope.methods import METHODS

    names = _names(methods)
    files = [Path(name) for name in names if name not in METHODS]
    directory = out or (files[0].parent if files else Path("compare"))
    require_one_process("compare")
    how = ExecutionConfig.make(execution, option_name)

    def resolve(info: ModelInfo) -> tuple[PerplexityConfig, int, list[comparing.ComparedMethod]]:
        tokens, made_for = comparing.resolve_lengths(info, (lengths or target).split(","), target)
        options = PerplexityConfig.make(scoring | {"lengths": tuple(tokens)}, option_name)
        factors = {"attention_factor": attention_factor, "own_attention_factors": True}
        return options, made_for, comparing.method_entries(info, names, made_for, **factors)

    def settings(info: ModelInfo) -> dict[str, Any]:
        of = {"model": info.source, "data": data, "field": field, "pack": pack}
        of |= {"stride": None, "tokens_per_document": scoring.get("tokens_per_document")}
        return of | {"attention_factor": attention_factor}

    info = inspect_model(model, **scaling, trust_remote_code=how.trust_remote_code)
    info.require_extendable()
    options, made_for, entries = resolve(info)
    comparing.check_entries(info, entries, options.lengths[-1])
    check_sources(data)
    of = settings(info)
    file = directory / "compare.json"
    comparing.check_same_comparison(file, entries, options.lengths, made_for, of)
    require_directory(directory)
    check_evaluation(info, options.lengths[-1], how, Ranks())
    loaded = load_model(model, how, info=info)
    with measurement_cache(directory) as cache:
        documents = comparing.perplexity_documents(
            loaded.tokenizer, data, names, field=field, pack=pack, exclude=True
        )
        comparison = comparing.compare_perplexity(
            loaded, entries, made_for, documents, options, cache, of
        )
        comparison.save(directory / "compare.json")
    figures = write_report(directory)
    if json_:
        print_json(comparison.to_json() | {"figures": [str(path) for path in figures]})
        return
    print_perplexity(comparison.rows())
    print_differences(comparison.differences())
    for path in figures:
        console.print(str(path), soft_wrap=True)


@app.command(
    epilog=examples(
        "longrope report runs/llama",
        "longrope report runs/first --json",
    )
)
def report(
    directory: Annotated[
        Path, typer.Argument(help="Output directory of extend, search or compare.")
    ],
    json_: Json = False,
) -> None:
    """Write a run's report again, or draw a search's or comparison's figures; print their paths."""
    from longrope.report.figures import draw_figures as draw
    from longrope.report.page import write_page

    written = write_page(directory) if (directory / "results.json").exists() else draw(directory)
    if json_:
        print_json({"figures": [str(path) for path in written]})
    else:
        for path in written:
            console.print(str(path), soft_wrap=True)


def _names(methods: str) -> list[str]:
    """Split methods and rescale files at commas, but not within the path of a file."""
    parts, names = methods.split(","), []
    while parts:
        joined = [",".join(parts[:count]).strip() for count in range(1, len(parts) + 1)]
        name = next((path for path in reversed(joined) if os.path.isfile(path)), joined[0])
        names.append(name)
        parts = parts[joined.index(name) + 1 :]
    return names
