"""The verb ``evaluate``."""

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
            help="none, pi, ntk, dynamic-ntk, yarn, or a rescale file; by default the factors of "
            "an extended model, else none."
        ),
    ] = None,
    passkey: Annotated[
        bool, typer.Option("--passkey", help="Measure passkey retrieval instead of perplexity.")
    ] = False,
    needle: Annotated[
        bool,
        typer.Option(
            "--needle", help="Measure retrieval of a sentence hidden among lines of --data."
        ),
    ] = False,
    benchmarks: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated lm-eval tasks to compare with the original model, such as "
            "arc_challenge,hellaswag,mmlu,truthfulqa_mc1 or RULER's niah_single_1."
        ),
    ] = None,
    benchmark_data: Annotated[
        Path | None, typer.Option(help="Directory with local copies of the hub's datasets.")
    ] = None,
    questions: Annotated[
        int | None, typer.Option(help="Questions per benchmark at most; by default all.")
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(help="Few-shot examples before each question; by default the paper's."),
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(
            help="Model to compare benchmarks with; by default the run's original model, else the "
            "same weights unscaled."
        ),
    ] = None,
    trials: Annotated[
        int, typer.Option(help="Retrieval trials per length, with stratified depths.")
    ] = 20,
    digits: Annotated[int, typer.Option(help="Digits of the hidden number.")] = 5,
    seed: Annotated[int, typer.Option(help="Random seed of hidden numbers and depths.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory for the results as JSON and the heat map; the same command resumes an "
            "interrupted measurement, except with --sequence-parallel."
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated lengths in tokens, such as 4k,8k or 2x; benchmarks use them only "
            "for RULER."
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Target length of the method; by default the longest length.")
    ] = None,
    data: Data = None,
    field: Field = "text",
    pack: Pack = False,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens between the starts of overlapping windows; by default they do not overlap."
        ),
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
    """Measure perplexity, retrieval or benchmarks of a model under one choice of factors."""
    from longrope.data.documents import check_sources
    from longrope.distributed import local_device, ranks
    from longrope.evaluate import compare
    from longrope.evaluate.benchmarks import BenchmarkOptions
    from longrope.evaluate.cache import measurement_cache, require_same
    from longrope.evaluate.measure import (
        Measurement,
        PerplexityOptions,
        RetrievalOptions,
        measure_all,
        model_identity,
    )
    from longrope.files import require_directory, write_atomically
    from longrope.inference.load import inspect_extended, inspect_weights
    from longrope.models.load import load_model
    from longrope.pipeline.checks import check_measuring

    kind = _kind(passkey, needle, benchmarks)
    measured_at = _target(rescale, target) if kind == "benchmarks" else lengths
    if measured_at is None:
        raise ValueError("--lengths is missing; give the tokens to measure at, such as 4k,8k")
    method, sources, texts = rescale or "none", tuple(data or ()), tuple(measured_at.split(","))
    tasks = tuple((benchmarks or "").split(","))
    local = str(benchmark_data) if benchmark_data else None
    ruler = tuple(lengths.split(",")) if lengths else ()

    of: dict[str, Any] = {"model": model, "rescale": rescale}
    if kind == "benchmarks":
        of |= {"tasks": tasks, "questions": questions, "shots": shots}
        of |= {"data": local, "lengths": ruler}
    else:
        of |= {"lengths": texts, "data": sources, "field": field}
    if kind == "perplexity":
        of |= {"target": target, "pack": pack, "stride": stride}
        of |= {"tokens_per_document": tokens_per_document, "attention_factor": attention_factor}
    elif kind != "benchmarks":
        of |= {"kind": kind, "trials": trials, "digits": digits, "seed": seed}
    of = json.loads(json.dumps(of))

    def options_for(info: Any, tokens: list[int]) -> Any:
        if kind == "perplexity":
            return PerplexityOptions(tuple(tokens), stride, tokens_per_document)
        if kind != "benchmarks":
            return RetrievalOptions(trials, digits, seed)
        own = compare.resolve_lengths(info, ruler, None)[0] if ruler else []
        return BenchmarkOptions(tasks, questions, shots, local, tuple(own))

    def entry_for(info: Any, made_for: int) -> compare.Entry:
        entries = compare.method_entries(
            info, [method], made_for, attention_factor=attention_factor
        )
        return entries[0]

    def validate(info: Any) -> tuple[list[int], int, Any, compare.Entry]:
        info.require_extendable()
        measured, made_for = compare.resolve_lengths(info, texts, target)
        options, entry = options_for(info, measured), entry_for(info, made_for)
        compare.check_entries(info, [entry], measured[-1])
        check_sources(sources)
        asked = list(measured)
        if kind == "benchmarks":
            options.check()
            asked = list(options.lengths)
        if out:
            require_directory(out)
            require_same(out / f"{kind}.json", of)
        # Benchmarks other than RULER have prompts of a few thousand tokens.
        longest = max(asked, default=min(info.original_max_position_embeddings or 0, 4096))
        how = {"dtype": dtype, "device": device, "chunk": chunk, "offload": offload}
        check_measuring(info, longest, how | {"offload_activations": offload_activations}, these)
        return measured, made_for, options, entry

    loading: dict[str, Any] = {
        "dtype": dtype,
        "offload": offload,
        "trust_remote_code": trust_remote_code,
    }
    with ranks(sequence_parallel) as these:
        if these.group_count > 1:
            raise ValueError(
                f"--sequence-parallel is {sequence_parallel} with {these.size} processes; evaluate "
                f"requires all processes in one group: give --sequence-parallel {these.size}"
            )
        loading |= {"device": local_device(device), "group": these.group}
        pair = None
        inspecting: dict[str, Any] = {
            "original_length": original_length,
            "trust_remote_code": trust_remote_code,
        }
        if rescale is None and existing_scaling is None:
            method_options = {"--target": target, "--attention-factor": attention_factor}
            _refuse_for_a_pair(model, method_options, trust_remote_code)
            info, pair = inspect_extended(model, **inspecting)
        else:
            scaling = existing_choice(existing_scaling)
            info = inspect_weights(model, existing_scaling=scaling, **inspecting)
        measured, made_for, options, entry = validate(info)
        loaded = load_model(info.source, info=info, **loading)
        name, choose = ("longrope", pair.choose) if pair else (entry.name, entry.rescale)
        how = {"chunk": chunk, "offload_activations": offload_activations}
        with measurement_cache(out, these.group.size) as cache:
            if kind == "benchmarks":
                before = _original(model, original, loading)
                longest = (pair.long if pair else choose(made_for)).max_position_embeddings
                rows = compare.compare_benchmarks(
                    loaded, choose, longest, before, options, cache, **how
                )
            else:
                documents = _documents(loaded.tokenizer, kind, sources, field, pack, method)
                identity = model_identity(loaded)
                wanted = [
                    Measurement(kind, identity, choose, length, options, documents)
                    for length in measured
                ]
                found = measure_all(loaded, wanted, cache, **how)
                if kind == "perplexity":
                    window = loaded.info.original_max_position_embeddings or 0
                    rows = [compare.perplexity_row(name, scores, window) for scores in found]
                else:
                    rows = [dataclasses.asdict(row) for some in found for row in some]
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


def _documents(
    tokenizer: Any, kind: str, sources: tuple[str, ...], field: str, pack: bool, method: str
) -> Any:
    """Return the documents of a measurement; warn about those that were searched on."""
    from longrope.data.windows import load_documents
    from longrope.evaluate.compare import perplexity_documents

    if kind == "passkey":
        return ()
    if kind == "needle":
        return load_documents(tokenizer, sources, field=field, held_out=True)
    return perplexity_documents(tokenizer, sources, [method], field=field, pack=pack, exclude=False)


def _refuse_for_a_pair(model: str, options: dict[str, Any], trust_remote_code: bool) -> None:
    """Refuse options of a method for a model that has factors of its own."""
    from longrope.checkpoints.importer import find_pair

    for name, value in options.items():
        if value is not None and find_pair(model, trust_remote_code):
            raise ValueError(
                f"{name} is {value}, which needs a method, and {model} has its own factors: omit "
                "it, or give --rescale"
            )


def _target(rescale: str | None, target: str | None) -> str:
    """Return the target length of a benchmark's model; a rescale file names its own."""
    from longrope.rope.methods import METHODS

    if target is None and rescale in METHODS and rescale != "none":
        raise ValueError(f"--target is missing; give the target length of {rescale}, such as 8x")
    return target or "1x"


def _original(model: str, named: str | None, loading: dict[str, Any]) -> Any:
    """Load the model that benchmarks compare with; None stands for the same weights."""
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
        raise ValueError(f"{' and '.join(f'--{name}' for name in chosen)}: choose one")
    return chosen[0] if chosen else "perplexity"
