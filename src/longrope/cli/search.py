"""The verbs that look at a model and search its factors."""

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


@app.command()
def inspect(
    model: Model = "bundled",
    existing_scaling: ExistingScaling = None,
    original_length: OriginalLength = None,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Show what a model is, and whether its context can be extended. Reads no weights."""
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
    target: Annotated[str, typer.Option(help="Tokens to reach: 131072, 128k or 8x.")] = ...,  # type: ignore[assignment]
    out: Annotated[
        Path, typer.Option(help="Directory for the result; resumes what it holds.")
    ] = ...,  # type: ignore[assignment]
    data: Data = None,
    field: Field = "text",
    pack: Pack = False,
    samples: Annotated[int, typer.Option(help="Windows that every candidate is scored on.")] = 5,
    passkeys: Annotated[
        int, typer.Option(help="Pass keys asked of every candidate too; their loss is added.")
    ] = 0,
    algorithm: Annotated[
        str, typer.Option(help="fast: down the slope; paper: LongRoPE's Algorithm 1.")
    ] = "gradient",
    budget: Annotated[
        int | None,
        typer.Option(
            help="Forwards of all windows; by default 27 (another is another search), paper: 1,344."
        ),
    ] = None,
    rate: Annotated[
        float, typer.Option(help="Largest step in ln λ (fast); three times that with one window.")
    ] = 0.06,
    step_windows: Annotated[
        int, typer.Option(help="Windows a step looks at; processes share them (fast).")
    ] = 1,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many generations without a new best (paper).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides windows and candidates.")] = 0,
    attention_factor: Annotated[
        float | None, typer.Option(help="For every candidate; by default √(1 + ln s / ln L).")
    ] = None,
    start_tokens: Annotated[
        int | None, typer.Option(help="Fix n̂ instead of searching it; 0 is what engines load.")
    ] = None,
    upper: Annotated[
        float | None, typer.Option(help="Largest factor; by default 1.25 · s, the paper's.")
    ] = None,
    population: Annotated[int, typer.Option(help="Size of the first generation (P).")] = 64,
    mutations: Annotated[int, typer.Option(help="Mutants a generation (N1).")] = 16,
    crossovers: Annotated[int, typer.Option(help="Crossovers a generation (N2).")] = 16,
    probability: Annotated[float, typer.Option(help="Of redrawing each factor (p).")] = 0.3,
    iterations: Annotated[int, typer.Option(help="Generations after the first (T).")] = 40,
    parents: Annotated[int, typer.Option(help="The best that have children (k).")] = 32,
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
    """Search the rescale factors for a longer context. Run again, it resumes."""
    from longrope.distributed import local_device, ranks
    from longrope.models.info import inspect_model
    from longrope.models.load import load_model
    from longrope.pipeline.checks import check_search
    from longrope.pipeline.recipe import make_recipe
    from longrope.search.run import SearchOptions, search_factors
    from longrope.search.settings import EvolutionSettings, SearchSettings

    options = SearchOptions(
        target=target,
        out=out,
        data=tuple(data or ()),
        field=field,
        pack=pack,
        attention_factor=attention_factor,
        start_tokens=start_tokens,
        upper=upper,
        how=SearchSettings(
            samples=samples,
            passkeys=passkeys,
            algorithm=algorithm,
            budget=budget,
            patience=patience,
            seed=seed,
            chunk=chunk,
            offload_activations=offload_activations,
            rate=rate,
            step_windows=step_windows,
            settings=EvolutionSettings(
                population, mutations, crossovers, probability, iterations, parents
            ),
        ),
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
        section = {"algorithm": algorithm, "samples": samples, "passkeys": passkeys}
        where = {"target": target, "offload_activations": offload_activations, "search": section}
        check_search(info, make_recipe(work | where), these)
        loaded = load_model(
            model,
            device=local_device(device),
            dtype=dtype,
            offload=offload,
            team=these.team,
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
    console.print(f"{state}: {result.forwards:g} forwards of all windows; loss in nats per token:")
    if algorithm == "gradient":
        console.print("  first candidates, on the windows that they are compared on (ramp F-G:")
        console.print("  what turns more than F times stays, less than G is interpolated in full)")
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
    """What ``--json`` prints of a ``SearchResult``."""
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
