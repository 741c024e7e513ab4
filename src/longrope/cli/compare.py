"""The verbs that compare methods and draw."""

from pathlib import Path
from typing import Annotated

import typer

from longrope.cli.app import app
from longrope.cli.options import (
    AttentionFactor,
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
    TokensPerDocument,
    TrustRemoteCode,
    existing_choice,
)
from longrope.cli.tables import console, print_differences, print_json, print_rows


@app.command()
def compare(
    model: Model = "bundled",
    target: Annotated[str, typer.Option(help="Tokens the methods are made for.")] = ...,  # type: ignore[assignment]
    methods: Annotated[
        str, typer.Option(help="Methods and rescale files, with commas between.")
    ] = "none,pi,ntk,dynamic-ntk,yarn",
    lengths: Annotated[
        str | None, typer.Option(help="Such as 512,1024; by default the target alone.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory for compare.json and the plots; by default the rescale file's, or "
            "compare/."
        ),
    ] = None,
    data: Data = None,
    field: Field = "text",
    pack: Pack = False,
    tokens_per_document: TokensPerDocument = None,
    attention_factor: AttentionFactor = None,
    device: Device = None,
    dtype: Dtype = "auto",
    chunk: Chunk = None,
    offload_activations: OffloadActivations = None,
    offload: Offload = None,
    existing_scaling: ExistingScaling = None,
    original_length: OriginalLength = None,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Compare methods and searched factors on documents that no search has seen.

    Run again, it resumes.
    """
    from longrope.distributed import Ranks, require_one_process
    from longrope.evaluate.cache import measurement_cache
    from longrope.evaluate.compare import run_comparison
    from longrope.evaluate.options import CompareOptions
    from longrope.files import require_directory
    from longrope.models.info import inspect_model
    from longrope.models.load import load_model
    from longrope.pipeline.checks import check_measuring
    from longrope.report.figures import report as write_report

    options = CompareOptions(
        methods=tuple(name.strip() for name in methods.split(",")),
        lengths=tuple((lengths or target).split(",")),
        target=target,
        data=tuple(data or ()),
        field=field,
        pack=pack,
        tokens_per_document=tokens_per_document,
        attention_factor=attention_factor,
        chunk=chunk,
        offload_activations=offload_activations,
        own_attention_factors=True,
    )
    directory = out or options.directory
    require_one_process("compare")

    info = inspect_model(
        model,
        existing_scaling=existing_choice(existing_scaling),
        original_length=original_length,
        trust_remote_code=trust_remote_code,
    )
    info.require_extendable()
    options.check(info)
    options.require_all_of(directory / "compare.json", info)
    require_directory(directory)
    how = {"dtype": dtype, "device": device, "chunk": chunk, "offload": offload}
    how["offload_activations"] = offload_activations
    check_measuring(info, options.resolve(info)[0][-1], how, Ranks())
    loaded = load_model(
        model,
        device=device,
        dtype=dtype,
        offload=offload,
        info=info,
        trust_remote_code=trust_remote_code,
    )
    with measurement_cache(directory) as unfinished:
        comparison = run_comparison(loaded, options, exclude_searched=True, unfinished=unfinished)
        comparison.save(directory / "compare.json")
    figures = write_report(directory)
    if json_:
        print_json(comparison.to_json() | {"figures": [str(path) for path in figures]})
        return
    print_rows(comparison.rows())
    print_differences(comparison.differences())
    for path in figures:
        console.print(str(path), soft_wrap=True)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="What extend, search or compare wrote to.")],
    json_: Json = False,
) -> None:
    """Write a run's page again, or draw a search's and a comparison's pictures."""
    from longrope.report.figures import report as draw
    from longrope.report.page import write_page

    written = write_page(directory) if (directory / "results.json").exists() else draw(directory)
    if json_:
        print_json({"figures": [str(path) for path in written]})
    else:
        for path in written:
            console.print(str(path), soft_wrap=True)
