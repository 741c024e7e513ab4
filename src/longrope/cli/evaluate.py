"""The verb that measures."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

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
    SequenceParallel,
    TokensPerDocument,
    TrustRemoteCode,
    existing_choice,
)
from longrope.cli.tables import console, print_benchmarks, print_json, print_retrieval, print_rows


@app.command()
def evaluate(
    model: Model = "bundled",
    rescale: Annotated[
        str | None,
        typer.Option(
            help="none, pi, ntk, dynamic-ntk, yarn, or a rescale file; by default none, or what "
            "the model was extended with."
        ),
    ] = None,
    passkey: Annotated[
        bool, typer.Option("--passkey", help="Retrieval of a pass key in place of perplexity.")
    ] = False,
    needle: Annotated[
        bool, typer.Option("--needle", help="Retrieval of a sentence among lines of --data.")
    ] = False,
    benchmarks: Annotated[
        str | None,
        typer.Option(
            help="lm-eval's tasks, such as arc_challenge,hellaswag,mmlu,truthfulqa_mc1 or RULER's "
            "niah_single_1, asked this model and the original one."
        ),
    ] = None,
    benchmark_data: Annotated[
        Path | None, typer.Option(help="Folder with copies of the hub's data sets.")
    ] = None,
    questions: Annotated[
        int | None, typer.Option(help="Of each benchmark at most so many; by default all.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(help="Examples before each question; by default the paper's.")
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(
            help="What benchmarks compare with; by default a run's, else the same weights unscaled."
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="Questions a length, depths stratified.")] = 20,
    digits: Annotated[int, typer.Option(help="Of the number that is asked for.")] = 5,
    seed: Annotated[int, typer.Option(help="Decides keys and depths.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory for the rows as JSON, and the heat map; interrupted, the same command "
            "goes on from what it holds (not with --sequence-parallel)."
        ),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Such as 4k,8k or 2x; benchmarks other than RULER need none.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="What a method is made for; by default the longest length.")
    ] = None,
    data: Data = None,
    field: Field = "text",
    pack: Pack = False,
    stride: Annotated[
        int | None, typer.Option(help="Slide the window by so many tokens, score only those.")
    ] = None,
    tokens_per_document: TokensPerDocument = None,
    attention_factor: AttentionFactor = None,
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
    """Measure perplexity, retrieval or benchmarks of a model under one rescale, or of a run."""
    from longrope.distributed import local_device, ranks
    from longrope.evaluate.ask import AskOptions, ask
    from longrope.evaluate.benchmarks import BenchmarkOptions
    from longrope.evaluate.cache import measurement_cache, require_same
    from longrope.evaluate.compare import run_comparison
    from longrope.evaluate.options import CompareOptions, Entry
    from longrope.evaluate.paired import compare_with_original
    from longrope.files import require_directory, write_atomically
    from longrope.inference.load import inspect_extended, inspect_weights
    from longrope.models.load import load_model
    from longrope.pipeline.checks import check_measuring

    kind = _kind(passkey, needle, benchmarks)
    measured_at = _made_for(rescale, target) if kind == "benchmarks" else lengths
    if measured_at is None:
        raise ValueError("--lengths is missing; give the tokens to measure at, such as 4k,8k")
    options = CompareOptions(
        methods=(rescale or "none",),
        lengths=tuple(measured_at.split(",")),
        target=target,
        data=tuple(data or ()),
        field=field,
        pack=pack,
        stride=stride,
        tokens_per_document=tokens_per_document,
        attention_factor=attention_factor,
        chunk=chunk,
        offload_activations=offload_activations,
    )
    asked = AskOptions(
        kind=kind,
        lengths=options.lengths,
        trials=trials,
        digits=digits,
        seed=seed,
        data=options.data,
        field=field,
        chunk=chunk,
        offload_activations=offload_activations,
    )
    standard = BenchmarkOptions(
        tuple((benchmarks or "").split(",")),
        questions,
        shots,
        str(benchmark_data) if benchmark_data else None,
        tuple(lengths.split(",")) if lengths else (),
        chunk,
        offload_activations,
    )

    what = {"perplexity": options, "benchmarks": standard}.get(kind, asked)
    of = {"model": model, "rescale": rescale} | dataclasses.asdict(what)  # type: ignore[call-overload]
    of = json.loads(
        json.dumps({k: v for k, v in of.items() if k not in ("chunk", "offload_activations")})
    )

    def validate(info: Any) -> None:
        info.require_extendable()
        if kind in ("passkey", "needle"):
            asked.check(info)
        else:
            options.check(info)
        measured = asked.resolve(info)
        if kind == "benchmarks":
            standard.check(info)
            measured = standard.resolve(info)
        if out:
            require_directory(out)
            require_same(out / f"{kind}.json", of)
        # Benchmarks that make no texts have prompts of a few thousand tokens.
        longest = max(measured, default=min(info.original_max_position_embeddings or 0, 4096))
        how = {"dtype": dtype, "device": device, "chunk": chunk, "offload": offload}
        check_measuring(info, longest, how | {"offload_activations": offload_activations}, these)

    loading: dict[str, Any] = {
        "dtype": dtype,
        "offload": offload,
        "trust_remote_code": trust_remote_code,
    }
    with ranks(sequence_parallel) as these:
        if these.teams > 1:
            raise ValueError(
                f"--sequence-parallel is {sequence_parallel}, of {these.size} processes; evaluate "
                "has one thing to do at a time: make it all of them"
            )
        loading |= {"device": local_device(device), "team": these.team}
        pair = None
        inspecting: dict[str, Any] = {
            "original_length": original_length,
            "trust_remote_code": trust_remote_code,
        }
        if rescale is None and existing_scaling is None:
            info, pair = inspect_extended(model, **inspecting)
            if pair:
                _refuse_for_a_pair(model, target, attention_factor)
        else:
            scaling = existing_choice(existing_scaling)
            info = inspect_weights(model, existing_scaling=scaling, **inspecting)
        validate(info)
        loaded = load_model(info.source, info=info, **loading)
        entry = Entry("longrope", pair.choose) if pair else options.entries(loaded.info)[0]
        with measurement_cache(out, these.team.size) as unfinished:
            if kind == "benchmarks":
                long = pair.long if pair else entry.rescale(options.resolve(loaded.info)[1])
                before = _original(model, original, loading)
                longest = long.max_position_embeddings
                rows = compare_with_original(
                    loaded, entry.rescale, longest, before, standard, unfinished
                )
            elif kind == "perplexity":
                rows = run_comparison(
                    loaded, options, exclude_searched=False, unfinished=unfinished, entries=[entry]
                ).rows()
            else:
                found = ask(loaded, asked, entry.rescale, unfinished)
                rows = [dataclasses.asdict(row) for row in found]
            figure = None
            if out and these.first:
                content = json.dumps({"of": of, kind: rows}, indent=1) + "\n"
                write_atomically(out / f"{kind}.json", content)
                if kind in ("passkey", "needle"):
                    from longrope.report import plots

                    heat_map = plots.retrieval_figure(rows, kind)
                    figure = plots.save_figure(heat_map, out / f"{kind}.png")
    if not these.first:
        return
    if json_:
        print_json({kind: rows})
        return
    show = {"perplexity": print_rows, "benchmarks": print_benchmarks}.get(kind, print_retrieval)
    show(rows)
    if figure:
        console.print(str(figure), soft_wrap=True)


def _refuse_for_a_pair(model: str, target: str | None, attention_factor: float | None) -> None:
    for name, value in (("--target", target), ("--attention-factor", attention_factor)):
        if value is not None:
            raise ValueError(
                f"{name} is {value}, for a method, and {model} has factors of its own: leave it "
                "out, or give --rescale"
            )


def _made_for(rescale: str | None, target: str | None) -> str:
    """The length that a benchmark's model is made for; a file says it itself."""
    from longrope.rope.methods import METHODS

    if target is None and rescale in METHODS and rescale != "none":
        raise ValueError(f"--target is missing; say what {rescale} is to be made for, such as 8x")
    return target or "1x"


def _original(model: str, named: str | None, loading: dict[str, Any]) -> Any:
    """What benchmarks compare with: as named, the run's, or None for the same weights."""
    from longrope.checkpoints.run_layout import original_of
    from longrope.models.load import load_model

    source: dict[str, Any] | None = {"source": named} if named else original_of(model)
    if source is None:
        return None
    return load_model(**loading, **source)


def _kind(passkey: bool, needle: bool, benchmarks: str | None) -> str:
    asked = {"passkey": passkey, "needle": needle, "benchmarks": bool(benchmarks)}
    chosen = [name for name, wanted in asked.items() if wanted]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(f'--{name}' for name in chosen)}: ask for one at a time")
    return chosen[0] if chosen else "perplexity"
