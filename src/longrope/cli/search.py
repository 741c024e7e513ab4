"""The verbs ``inspect`` and ``search``."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from longrope.cli.app import app
from longrope.cli.options import (
    EXECUTION,
    SCALING,
    Data,
    Field,
    Json,
    Model,
    Pack,
    TrustRemoteCode,
    add_options,
    examples,
    option_name,
)
from longrope.cli.tables import console, print_json
from longrope.execution import ExecutionConfig
from longrope.search.settings import (
    EvolutionSearchConfig,
    GradientSearchConfig,
    make_search_config,
)

SEARCHES = {"Gradient search": GradientSearchConfig, "Evolution search": EvolutionSearchConfig}


@app.command(
    epilog=examples(
        "longrope inspect Qwen/Qwen3-1.7B-Base",
        "longrope inspect model.gguf --json",
    )
)
@add_options("scaling", SCALING)
def inspect(
    *,
    model: Model = "bundled",
    scaling: dict[str, Any],
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Print a model's properties and whether its context can be extended. Reads no weights."""
    from longrope.models.info import inspect_model
    from longrope.pipeline.advice import advise_model

    info = inspect_model(model, **scaling, trust_remote_code=trust_remote_code)
    if json_:
        print_json(dataclasses.asdict(info))
        return
    table = Table(show_header=False, box=None)
    inner = ("base_factors", "base_attention_factor", "kv_numbers", "boundary", "explicit_scores")
    inner += ("rotary_layer_type", "replaces_scaling")
    for name, value in dataclasses.asdict(info).items():
        if name not in inner:
            shown = f"{value:,}" if type(value) is int else str(value)
            table.add_row(name, shown)
    console.print(table)
    options = [
        word for name, value in scaling.items() for word in (option_name(name), str(value))
    ] + ["--trust-remote-code"] * trust_remote_code
    for line in advise_model(info, options):
        console.print(line, soft_wrap=True)


@app.command(
    epilog=examples(
        "longrope search bundled --target 8x --data python-library --out runs/first",
        "longrope search models/mistral --target 64k --data books/ --out runs/mistral",
    )
)
@add_options("config", SEARCHES, shared="Search")
@add_options("scaling", SCALING)
@add_options("execution", EXECUTION)
def search(
    *,
    model: Model = "bundled",
    target: Annotated[str, typer.Option(help="Target length in tokens: 131072, 128k or 8x.")],
    out: Annotated[Path, typer.Option(help="Output directory; a search that it holds is resumed.")],
    data: Data,
    field: Field = "text",
    pack: Pack = False,
    config: dict[str, Any],
    seed: Annotated[int, typer.Option(help="Random seed for windows and candidates.")] = 0,
    attention_factor: Annotated[
        float | None,
        typer.Option(help="Attention factor of every candidate; default √(1 + ln s / ln L)."),
    ] = None,
    start_tokens: Annotated[
        int | None,
        typer.Option(help="Fixed number of start tokens n̂, searched if not given; engines load 0."),
    ] = None,
    scaling: dict[str, Any],
    execution: dict[str, Any],
    json_: Json = False,
) -> None:
    """Search the rescale factors for a target length, and print the loss. Run again to resume."""
    from longrope.distributed import ranks
    from longrope.models.info import inspect_model
    from longrope.models.load import load_model
    from longrope.pipeline.checks import check_search
    from longrope.search.run import SearchOptions, describe_gain, run_search

    options = SearchOptions(
        target=target,
        out=out,
        data=tuple(data),
        field=field,
        pack=pack,
        attention_factor=attention_factor,
        start_tokens=start_tokens,
        seed=seed,
        config=make_search_config(config, option_name),
    )
    how = ExecutionConfig.make(execution, option_name)
    with ranks(how.sequence_parallel) as these:
        info = inspect_model(model, **scaling, trust_remote_code=how.trust_remote_code)
        info.require_extendable()
        options.check(info)
        check_search(info, target, options.config, how, these)
        loaded = load_model(model, how, group=these.group, info=info)
        result = run_search(loaded, options, these)
    if not these.first:
        return
    if json_:
        print_json(_summary(result, out))
        return
    state = "done" if result.computed else "already done"
    console.print(f"{state}: {result.forwards:g} forward passes over all windows")
    console.print(describe_gain(result), soft_wrap=True)
    if options.config.algorithm == "gradient":
        console.print("Starts, on the windows of their comparison (ramp F-G: dimensions above F")
        console.print("rotations are not scaled, below G they are interpolated in full):")
    for name, loss in result.starts.items():
        console.print(f"  {name:12} {loss:.4f}")
    if result.best.start_tokens and result.portable_loss is not None:
        console.print(
            f"The result has {result.best.start_tokens} start tokens, which only longrope applies; "
            f"portable.json has none: {result.portable_loss:.4f}",
            soft_wrap=True,
        )
    if result.not_finite:
        console.print(f"  {result.not_finite} candidates had no finite loss")
    console.print(f"{out / 'rescale.json'}", soft_wrap=True)


def _summary(result: Any, out: Path) -> dict[str, Any]:
    """Return a ``SearchResult`` as the JSON that the verb ``search`` prints."""
    return {
        "rescale": str(out / "rescale.json"),
        "portable": str(out / "portable.json") if result.portable else None,
        "history": str(out / "history.jsonl"),
        "loss": result.best_loss,
        "portable_loss": result.portable_loss,
        "start_tokens": result.best.start_tokens,
        "starts": result.starts,
        "best_start": result.best_start and result.best_start[0],
        "best_start_loss": result.best_start and result.best_start[1],
        "gain": result.gain,
        "gain_standard_error": result.gain_standard_error,
        "evaluations": result.evaluations,
        "forwards": result.forwards,
        "computed": result.computed,
        "not_finite": result.not_finite,
    }
