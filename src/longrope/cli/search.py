"""The verbs ``inspect`` and ``search``."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from longrope.cli.app import app
from longrope.cli.options import (
    Chunk,
    Data,
    Device,
    Dtype,
    ExistingScaling,
    Field,
    Json,
    Model,
    Offload,
    OffloadActivations,
    OriginalLength,
    Pack,
    SequenceParallel,
    TrustRemoteCode,
    existing_choice,
)
from longrope.cli.tables import console, print_json
from longrope.search.settings import SEARCH_CONFIGS, make_search_config

# Every option of a search configuration, of either algorithm.
SEARCH_OPTIONS = list(
    dict.fromkeys(name for model in SEARCH_CONFIGS.values() for name in model.model_fields)
)


def _option(name: str) -> Any:
    """Return the command-line option of a field of the search configurations."""
    fields = {a: m.model_fields[name] for a, m in SEARCH_CONFIGS.items() if name in m.model_fields}
    defaults = {a: field.default for a, field in fields.items() if field.default is not None}
    if name == "algorithm":
        defaults = {"": "gradient"}
    text = next(iter(fields.values())).description or ""
    if len(fields) == 1:
        text = f"For {next(iter(fields))}: {text[0].lower()}{text[1:]}"
    for algorithm, default in list(defaults.items())[:1]:
        only = f" for {algorithm}" if 1 == len(defaults) < len(fields) and algorithm else ""
        text = f"{text.removesuffix('.')}; default {default}{only}."
    return typer.Option(help=text)


@app.command()
def inspect(
    model: Model = "bundled",
    existing_scaling: ExistingScaling = None,
    original_length: OriginalLength = None,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Show the properties of a model and whether its context can be extended. Reads no weights."""
    from longrope.models.info import inspect_model

    info = inspect_model(
        model,
        existing_scaling=existing_choice(existing_scaling),
        original_length=original_length,
        trust_remote_code=trust_remote_code,
    )
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


@app.command()
def search(
    model: Model = "bundled",
    target: Annotated[str, typer.Option(help="Target length in tokens: 131072, 128k or 8x.")] = ...,  # type: ignore[assignment]
    out: Annotated[
        Path, typer.Option(help="Output directory; a search that it holds is resumed.")
    ] = ...,  # type: ignore[assignment]
    data: Data = None,
    field: Field = "text",
    pack: Pack = False,
    algorithm: Annotated[str | None, _option("algorithm")] = None,
    windows: Annotated[int | None, _option("windows")] = None,
    passkey_prompts: Annotated[int | None, _option("passkey_prompts")] = None,
    max_factor: Annotated[float | None, _option("max_factor")] = None,
    budget: Annotated[int | None, _option("budget")] = None,
    step_size: Annotated[float | None, _option("step_size")] = None,
    windows_per_step: Annotated[int | None, _option("windows_per_step")] = None,
    patience: Annotated[int | None, _option("patience")] = None,
    population: Annotated[int | None, _option("population")] = None,
    mutations: Annotated[int | None, _option("mutations")] = None,
    crossovers: Annotated[int | None, _option("crossovers")] = None,
    mutation_probability: Annotated[float | None, _option("mutation_probability")] = None,
    iterations: Annotated[int | None, _option("iterations")] = None,
    parents: Annotated[int | None, _option("parents")] = None,
    seed: Annotated[int, typer.Option(help="Random seed for windows and candidates.")] = 0,
    attention_factor: Annotated[
        float | None,
        typer.Option(help="Attention factor of every candidate; default √(1 + ln s / ln L)."),
    ] = None,
    start_tokens: Annotated[
        int | None,
        typer.Option(help="Fixed number of start tokens n̂, searched if not given; engines load 0."),
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    chunk: Chunk = None,
    offload_activations: OffloadActivations = None,
    offload: Offload = None,
    sequence_parallel: SequenceParallel = 1,
    existing_scaling: ExistingScaling = None,
    original_length: OriginalLength = None,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Search the rescale factors for a longer context. Run again to resume."""
    arguments = dict(locals())
    from longrope.distributed import local_device, ranks
    from longrope.models.info import inspect_model
    from longrope.models.load import load_model
    from longrope.pipeline.checks import check_search
    from longrope.pipeline.recipe import make_recipe
    from longrope.search.run import SearchOptions, search_factors

    given = {name: arguments[name] for name in SEARCH_OPTIONS if arguments[name] is not None}
    config = make_search_config(given, lambda name: "--" + name.replace("_", "-"))
    options = SearchOptions(
        target=target,
        out=out,
        data=tuple(data or ()),
        field=field,
        pack=pack,
        attention_factor=attention_factor,
        start_tokens=start_tokens,
        seed=seed,
        chunk=chunk,
        offload_activations=offload_activations,
        config=config,
    )

    with ranks(sequence_parallel) as these:
        info = inspect_model(
            model,
            existing_scaling=existing_choice(existing_scaling),
            original_length=original_length,
            trust_remote_code=trust_remote_code,
        )
        info.require_extendable()
        options.check(info)
        work = {"dtype": dtype, "device": device, "chunk": chunk, "offload": offload}
        where = {"target": target, "offload_activations": offload_activations}
        where |= {"search": config.model_dump()}
        check_search(info, make_recipe(work | where), these)
        loaded = load_model(
            model,
            device=local_device(device),
            dtype=dtype,
            offload=offload,
            group=these.group,
            info=info,
            trust_remote_code=trust_remote_code,
        )
        result = search_factors(loaded, options, these)
    if not these.first:
        return
    if json_:
        print_json(_summary(result, out))
        return
    state = "done" if result.computed else "already done"
    console.print(
        f"{state}: {result.forwards:g} forward passes over all windows; loss in nats per token:"
    )
    if config.algorithm == "gradient":
        console.print("  starts, on the windows of their comparison (ramp F-G: dimensions above F")
        console.print("  rotations are not scaled, below G they are interpolated in full)")
    for name, loss in result.starts.items():
        console.print(f"  {name:12} {loss:.4f}")
    console.print(
        f"  best         {result.best_loss:.4f}  (start tokens {result.best.start_tokens})"
    )
    if result.portable_loss is not None:
        console.print(f"  portable     {result.portable_loss:.4f}  (start tokens 0)")
    if result.not_finite:
        console.print(f"  {result.not_finite} candidates had no finite loss")
    console.print(f"{out / 'rescale.json'}", soft_wrap=True)


def _summary(result: Any, out: Path) -> dict[str, Any]:
    """Return the JSON output of a ``SearchResult``."""
    return {
        "rescale": str(out / "rescale.json"),
        "portable": str(out / "portable.json") if result.portable else None,
        "history": str(out / "history.jsonl"),
        "loss": result.best_loss,
        "portable_loss": result.portable_loss,
        "start_tokens": result.best.start_tokens,
        "starts": result.starts,
        "evaluations": result.evaluations,
        "forwards": result.forwards,
        "computed": result.computed,
        "not_finite": result.not_finite,
    }
