"""The verbs that hand an extended model to engines, prove what they do, and take one back."""

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from longrope.cli.app import app
from longrope.cli.options import (
    EXECUTION,
    SCALING,
    Json,
    TrustRemoteCode,
    add_options,
    examples,
    option_name,
)
from longrope.cli.tables import console, print_json
from longrope.execution import ExecutionConfig


@app.command(
    epilog=examples(
        "longrope export runs/llama --format gguf --out llama-long.gguf",
        "longrope export bundled --long-factors yarn --target 8x --out yarn-model",
    )
)
@add_options("scaling", SCALING)
def export(
    *,
    model: Annotated[str, typer.Argument(help="A run, a checkpoint, a hub id, or a GGUF file.")],
    out: Annotated[Path, typer.Option(help="Directory, or .gguf file, to write.")],
    format_: Annotated[
        str, typer.Option("--format", help="hf, hf-static, gguf or gguf-static.")
    ] = "hf",
    long_factors: Annotated[
        str | None,
        typer.Option(
            help="Long factors: a file, or a method with --target. A run, an export and a "
            "checkpoint with longrope scaling have their own."
        ),
    ] = None,
    short_factors: Annotated[
        str | None, typer.Option(help="Short factors; without them the long serve every length.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Target length of a method or a CSV file, in tokens or such as 8x."),
    ] = None,
    fold_attention_factor: Annotated[
        bool,
        typer.Option(
            "--fold-attention-factor",
            help="Fold the attention factor into the query projections, for mlx-lm.",
        ),
    ] = False,
    drop_start_tokens: Annotated[
        bool, typer.Option("--drop-start-tokens", help="Export as if n̂ were 0.")
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Dtype of weights that come from a GGUF file."),
    ] = "bfloat16",
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    hard_links: Annotated[
        bool,
        typer.Option(
            "--hard-links",
            help="Hard-link weight files instead of copying them, to save disk space. Whatever "
            "then writes into a weight file of the export changes MODEL too, and the reverse.",
        ),
    ] = False,
    scaling: dict[str, Any],
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Export an extended model for an engine, and print the command that verifies it."""
    from longrope.checkpoints.export import ExportOptions
    from longrope.checkpoints.export import export as write

    chosen: Any = {"format": format_, "fold_attention_factor": fold_attention_factor}
    manifest = write(
        ExportOptions(
            model,
            out,
            long_factors=long_factors,
            short_factors=short_factors,
            target=target,
            drop_start_tokens=drop_start_tokens,
            **scaling,
            dtype=dtype,
            force=force,
            hard_links=hard_links,
            trust_remote_code=trust_remote_code,
            **chosen,
        )
    )
    if json_:
        print_json(manifest.to_json())
        return
    console.print(f"{out}: {format_}, {manifest.pair.long.max_position_embeddings:,} tokens")
    engine = "llamacpp" if format_.startswith("gguf") else "transformers"
    command = shlex.join(["longrope", "verify", str(out), "--engine", engine, "--source", model])
    console.print(f"prove it: {command}", soft_wrap=True)


@app.command(
    epilog=examples(
        "longrope verify exported --engine vllm --engine-python vllm-env/bin/python",
        "longrope verify model.gguf --engine llamacpp --lengths 4k,16k",
    )
)
@add_options(
    "execution",
    EXECUTION,
    leave_out=("dtype", "offload_activations", "sequence_parallel", "trust_remote_code"),
)
def verify(
    *,
    path: Annotated[str, typer.Argument(help="What export wrote: a directory or a GGUF file.")],
    engine: Annotated[
        str, typer.Option(help="transformers, transformers-legacy, vllm, llamacpp or mlx.")
    ] = "transformers",
    engine_python: Annotated[
        str | None, typer.Option(help="The Python of the engine's own environment.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="The model or run that was exported, to compare with its weights; by default "
            "with the export's own."
        ),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Prompts' tokens; by default around the boundary and deep.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="At each length.")] = 2,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Dtype of both sides.")
    ] = "float32",
    execution: dict[str, Any],
    json_: Json = False,
) -> None:
    """Verify an engine's factors by its log-probabilities; exit code 1 if not the intended ones."""
    from longrope.engines.check import Reference, advice
    from longrope.engines.check import verify as ask
    from longrope.engines.specs import require_engine
    from longrope.units import parse_length

    if prompts < 1:
        raise ValueError(f"--prompts is {prompts}; it must be at least 1")
    how = ExecutionConfig.make({"dtype": dtype} | execution, option_name)
    points = tuple(parse_length(part) for part in lengths.split(",")) if lengths else ()
    require_engine(path, engine, engine_python)
    reference = Reference(path, how, source)
    verdict = ask(reference, engine, engine_python=engine_python, lengths=points, prompts=prompts)
    if json_:
        print_json(dataclasses.asdict(verdict) | {"right": verdict.right})
    else:
        table = Table(
            "tokens", "context", "applied", "intended", "largest |Δ|", "mean |Δ| from each"
        )
        for line in verdict.lines:
            each = ", ".join(f"{name} {d:.2g}" for name, d in sorted(line.distances.items()))
            context = f"{line.context:,}" if line.context else ""
            shown = (f"{line.length:,}", context, line.applied, line.intended)
            table.add_row(*shown, f"{line.largest:.2g}", each)
        console.print(f"{verdict.version}, log-probabilities in nats")
        console.print("prompts: source code of the Python library")
        console.print(table)
        for text in advice(verdict):
            console.print(text, soft_wrap=True)
    if not verdict.right:
        raise typer.Exit(1)


@app.command(
    "import",
    epilog=examples(
        "longrope import microsoft/Phi-3-mini-128k-instruct --out factors/phi3",
        "longrope import model.gguf --out factors/gguf",
    ),
)
def import_(
    model: Annotated[str, typer.Argument(help="A checkpoint or GGUF file that is scaled already.")],
    out: Annotated[Path, typer.Option(help="Directory for rescale.json and short.json.")] = ...,  # type: ignore[assignment]
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Import a scaled checkpoint's factors, and print where they are.

    The scaling is longrope, yarn, llama3, linear or dynamic, or that of a GGUF file.
    """
    from longrope.checkpoints.importer import import_pair

    files = {"long": out / "rescale.json", "short": out / "short.json"}
    for file in files.values():
        if file.exists() and not force:
            raise ValueError(f"{file} exists already; give another --out, or --force to replace it")
    pair = import_pair(model, trust_remote_code=trust_remote_code)
    pair.long.save(files["long"])
    pair.short.save(files["short"])
    if json_:
        print_json({"long": pair.long.to_json(), "short": pair.short.to_json()})
        return
    for name, rescale in (("long", pair.long), ("short", pair.short)):
        low, high = min(rescale.factors), max(rescale.factors)
        console.print(
            f"{files[name]}: for {rescale.max_position_embeddings:,} tokens, factors {low:.4g} to "
            f"{high:.4g}, attention factor {rescale.attention_factor:.4g}",
            soft_wrap=True,
        )
