"""The verbs ``evaluate perplexity``, ``passkey``, ``needle`` and ``benchmarks``."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pydantic
import typer

from longrope.cli.app import app
from longrope.cli.options import (
    EXECUTION,
    Data,
    Field,
    Json,
    Model,
    Pack,
    ScalingOptions,
    add_options,
    examples,
    option_name,
)
from longrope.cli.tables import (
    console,
    print_benchmarks,
    print_json,
    print_perplexity,
    print_retrieval,
)
from longrope.evaluate.settings import BenchmarkConfig, PerplexityConfig, RetrievalConfig
from longrope.execution import ExecutionConfig

if TYPE_CHECKING:
    from longrope.distributed import Ranks
    from longrope.evaluate.compare import ComparedMethod
    from longrope.models.info import ModelInfo
    from longrope.rope.pair import RescalePair

verbs = typer.Typer(help="Measure perplexity, retrieval or benchmarks of a model.")
app.add_typer(verbs, name="evaluate")

Lengths = Annotated[
    str, typer.Option(help="Comma-separated lengths in tokens, such as 4k,8k or 2x.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Directory for the results; the same command resumes an interrupted measurement, "
        "except with --sequence-parallel."
    ),
]


class _Subject(ScalingOptions):
    """The model and factors that an ``evaluate`` verb measures, as its options name them."""

    model: str
    execution: ExecutionConfig
    rescale: str | None = pydantic.Field(
        default=None,
        description="none, pi, ntk, dynamic-ntk, yarn, or a rescale file; by default the scaling "
        "that the model has.",
    )
    target: str | None = pydantic.Field(
        default=None,
        description="Target length of the method; by default the longest of --lengths.",
    )
    attention_factor: float | None = pydantic.Field(
        default=None, description="Attention factor of a method (not of a rescale file)."
    )

    @property
    def method(self) -> str:
        return self.rescale or "none"

    def inspect(self) -> "tuple[ModelInfo, RescalePair | None]":
        """Inspect the verb's model, and read its own factors where the options name no others."""
        from longrope.inference.load import inspect_to_measure, inspect_weights

        how: dict[str, Any] = {
            "rope_scaling": self.rope_scaling,
            "original_length": self.original_length,
            "trust_remote_code": self.execution.trust_remote_code,
        }
        if self.rescale is None:
            if self.rope_scaling is None:
                self._refuse_options_of_a_method()
            return inspect_to_measure(self.model, **how)
        info = inspect_weights(self.model, **how)
        info.require_extendable()
        return info, None

    def _refuse_options_of_a_method(self) -> None:
        """Refuse a verb's options for methods if the model has factors of its own."""
        from longrope.checkpoints.importer import find_pair

        for name in ("target", "attention_factor"):
            given = getattr(self, name) is not None
            if given and find_pair(self.model, self.execution.trust_remote_code):
                raise ValueError(
                    f"{option_name(name)} is {getattr(self, name)}, which needs a method, and "
                    f"{self.model} has its own factors: omit it, or give --rescale"
                )

    def entry(self, info: "ModelInfo", made_for: int, longest: int) -> "ComparedMethod":
        """Return the factors that the verb's options name; check that they fit the model."""
        from longrope.evaluate.compare import check_entries, method_entries

        factor = self.attention_factor
        (entry,) = method_entries(info, [self.method], made_for, attention_factor=factor)
        check_entries(info, [entry], longest)
        return entry


def _measures(verb: Callable[..., None]) -> Callable[..., None]:
    """Give an ``evaluate`` verb the options that say what is measured and how it computes."""
    verb = add_options("subject", {"": _Subject}, leave_out=("model", "execution"))(verb)
    return add_options("execution", EXECUTION)(verb)


def _subject(model: str, options: dict[str, Any], execution: dict[str, Any]) -> _Subject:
    how = ExecutionConfig.make(execution, option_name)
    return _Subject.make(options | {"model": model, "execution": how}, option_name)


@verbs.command(
    epilog=examples(
        "longrope evaluate perplexity runs/llama --data books/ --lengths 8k,64k",
        "longrope evaluate perplexity bundled --data books/ --rescale yarn --lengths 2k",
    )
)
@add_options("scoring", {"": PerplexityConfig}, leave_out=("lengths",))
@_measures
def perplexity(
    *,
    model: Model = "bundled",
    lengths: Lengths,
    data: Data,
    field: Field = "text",
    pack: Pack = False,
    scoring: dict[str, Any],
    out: Out = None,
    subject: dict[str, Any],
    execution: dict[str, Any],
    json_: Json = False,
) -> None:
    """Measure and print perplexity on documents, on the same tokens at every length."""
    from longrope.evaluate.compare import perplexity_documents, perplexity_row

    asked = _subject(model, subject, execution)
    sources = tuple(data)
    of = {"data": sources, "field": field, "pack": pack}

    def load(tokenizer: Any) -> Any:
        return perplexity_documents(
            tokenizer, sources, [asked.method], field=field, pack=pack, exclude=False
        )

    rows = _measure(
        "perplexity",
        asked,
        lengths,
        sources,
        of | {"stride": None, "tokens_per_document": None} | scoring,
        lambda tokens: PerplexityConfig.make(scoring | {"lengths": tuple(tokens)}, option_name),
        load,
        lambda name, info, scores: [
            perplexity_row(name, scores, info.original_max_position_embeddings or 0)
        ],
        out,
    )
    _show("perplexity", rows, print_perplexity, out, json_)


@verbs.command(
    epilog=examples(
        "longrope evaluate passkey runs/llama --lengths 8k,64k",
        "longrope evaluate passkey bundled --rescale yarn --lengths 512,2k --trials 10",
    )
)
@add_options("retrieval", {"": RetrievalConfig})
@_measures
def passkey(
    *,
    model: Model = "bundled",
    lengths: Lengths,
    retrieval: dict[str, Any],
    out: Out = None,
    subject: dict[str, Any],
    execution: dict[str, Any],
    json_: Json = False,
) -> None:
    """Measure and print retrieval of a number hidden in repeated sentences."""
    asked = _subject(model, subject, execution)
    _retrieve("passkey", asked, lengths, (), "text", retrieval, out, json_)


@verbs.command(
    epilog=examples(
        "longrope evaluate needle runs/llama --data books/ --lengths 8k,64k",
        "longrope evaluate needle bundled --data python-library --lengths 2x --trials 5",
    )
)
@add_options("retrieval", {"": RetrievalConfig})
@_measures
def needle(
    *,
    model: Model = "bundled",
    lengths: Lengths,
    data: Data,
    field: Field = "text",
    retrieval: dict[str, Any],
    out: Out = None,
    subject: dict[str, Any],
    execution: dict[str, Any],
    json_: Json = False,
) -> None:
    """Measure and print retrieval of a sentence hidden among lines of documents."""
    asked = _subject(model, subject, execution)
    _retrieve("needle", asked, lengths, tuple(data), field, retrieval, out, json_)


@verbs.command(
    epilog=examples(
        "longrope evaluate benchmarks runs/llama --tasks arc_challenge,hellaswag",
        "longrope evaluate benchmarks runs/llama --tasks niah_single_1 --lengths 8k,64k",
    )
)
@add_options("config", {"": BenchmarkConfig}, leave_out=("tasks", "ruler_lengths"))
@_measures
def benchmarks(
    *,
    model: Model = "bundled",
    tasks: Annotated[
        str,
        typer.Option(help=BenchmarkConfig.model_fields["tasks"].description, metavar="TASK,…"),
    ],
    lengths: Annotated[
        str | None,
        typer.Option(help=BenchmarkConfig.model_fields["ruler_lengths"].description),
    ] = None,
    config: dict[str, Any],
    original: Annotated[
        str | None,
        typer.Option(
            help="Model to compare with; by default the run's original model, else the same "
            "weights unscaled."
        ),
    ] = None,
    out: Out = None,
    subject: dict[str, Any],
    execution: dict[str, Any],
    json_: Json = False,
) -> None:
    """Print an extended model's scores in lm-eval tasks beside those of the original model."""
    from longrope.distributed import ranks
    from longrope.evaluate.benchmarks import check_benchmarks
    from longrope.evaluate.cache import measurement_cache
    from longrope.evaluate.compare import compare_benchmarks, resolve_lengths
    from longrope.models.load import load_model
    from longrope.rope.methods import METHODS

    asked = _subject(model, subject, execution)
    if asked.target is None and asked.method in METHODS and asked.method != "none":
        raise ValueError(
            f"--target is missing; give the target length of {asked.method}, such as 8x"
        )
    ruler = tuple(lengths.split(",")) if lengths else ()
    benchmark = BenchmarkConfig.make(config | {"tasks": tuple(tasks.split(","))}, option_name)
    of = _of(asked, benchmark.model_dump(mode="json") | {"lengths": ruler, "original": original})
    with ranks(asked.execution.sequence_parallel) as these:
        info, pair = asked.inspect()
        (measured,), made_for = resolve_lengths(info, (asked.target or "1x",), asked.target)
        entry = asked.entry(info, made_for, measured)
        if ruler:
            tokens = resolve_lengths(info, ruler, None)[0]
            benchmark = benchmark.model_copy(update={"ruler_lengths": tuple(tokens)})
        check_benchmarks(benchmark)
        # Benchmarks other than RULER have prompts of a few thousand tokens.
        usual = min(info.original_max_position_embeddings or 0, 4096)
        _check(
            "benchmarks", asked, info, these, max(benchmark.ruler_lengths, default=usual), of, out
        )
        loaded = load_model(info.source, asked.execution, info=info, group=these.group)
        choose = pair.choose if pair else entry.rescale
        longest = (pair.long if pair else choose(made_for)).max_position_embeddings
        with measurement_cache(out, these.group.size) as cache:
            before = _original(asked.model, original, asked.execution)
            rows = compare_benchmarks(loaded, choose, longest, before, benchmark, cache)
            _save("benchmarks", rows, of, out, these)
        if these.first:
            _show("benchmarks", rows, print_benchmarks, None, json_)


def _retrieve(
    kind: str,
    subject: _Subject,
    lengths: str,
    sources: tuple[str, ...],
    field: str,
    retrieval: dict[str, Any],
    out: Path | None,
    json_: bool,
) -> None:
    from longrope.data.windows import load_documents

    config = RetrievalConfig.make(retrieval, option_name)

    def load(tokenizer: Any) -> Any:
        if kind == "passkey":
            return ()
        return load_documents(tokenizer, sources, field)

    rows = _measure(
        kind,
        subject,
        lengths,
        sources,
        {"data": sources, "field": field} | config.model_dump(),
        lambda tokens: config,
        load,
        lambda name, info, found: [dataclasses.asdict(row) for row in found],
        out,
    )
    _show(kind, rows, print_retrieval, out, json_)


def _measure(
    kind: str,
    subject: _Subject,
    lengths: str,
    sources: tuple[str, ...],
    options: dict[str, Any],
    config_for: Callable[[list[int]], PerplexityConfig | RetrievalConfig],
    load_documents: Callable[[Any], Any],
    to_rows: Callable[[str, "ModelInfo", Any], list[dict[str, Any]]],
    out: Path | None,
) -> list[dict[str, Any]] | None:
    """Run an ``evaluate`` verb's measurements; return rows on the process that prints."""
    from longrope.data.documents import check_sources
    from longrope.distributed import ranks
    from longrope.evaluate.cache import measurement_cache
    from longrope.evaluate.compare import resolve_lengths
    from longrope.evaluate.measure import Measurement, measure_all, model_identity
    from longrope.models.load import load_model

    how, texts = subject.execution, tuple(lengths.split(","))
    of = _of(subject, options | {"lengths": texts})
    with ranks(how.sequence_parallel) as these:
        info, pair = subject.inspect()
        measured, made_for = resolve_lengths(info, texts, subject.target)
        config, entry = config_for(measured), subject.entry(info, made_for, measured[-1])
        if kind != "passkey":
            check_sources(sources)
        _check(kind, subject, info, these, measured[-1], of, out)
        loaded = load_model(info.source, how, info=info, group=these.group)
        name, choose = ("longrope", pair.choose) if pair else (entry.name, entry.rescale)
        with measurement_cache(out, these.group.size) as cache:
            documents, identity = load_documents(loaded.tokenizer), model_identity(loaded)
            wanted = [
                Measurement(kind, identity, choose, length, config, documents)
                for length in measured
            ]
            found = measure_all(loaded, wanted, cache)
            rows = [row for one in found for row in to_rows(name, info, one)]
            _save(kind, rows, of, out, these)
        return rows if these.first else None


def _of(subject: _Subject, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of an ``evaluate`` verb as its result file stores them."""
    of = {
        "model": subject.model,
        "rescale": subject.rescale,
        "target": subject.target,
        "attention_factor": subject.attention_factor,
        "rope_scaling": subject.rope_scaling,
        "original_length": subject.original_length,
        "dtype": subject.execution.dtype,
    }
    return json.loads(json.dumps(of | options))


def _check(
    kind: str,
    subject: _Subject,
    info: "ModelInfo",
    these: "Ranks",
    longest: int,
    of: dict[str, Any],
    out: Path | None,
) -> None:
    """Refuse an ``evaluate`` verb that cannot run, before any weights are read."""
    from longrope.evaluate.cache import require_same
    from longrope.files.atomic import require_directory
    from longrope.pipeline.checks import check_evaluation

    if these.group_count > 1:
        raise ValueError(
            f"--sequence-parallel is {subject.execution.sequence_parallel} with {these.size} "
            "processes; evaluate requires all processes in one group: give --sequence-parallel "
            f"{these.size}"
        )
    if out:
        require_directory(out)
        require_same(out / f"{kind}.json", of)
    check_evaluation(info, longest, subject.execution, these)


def _save(
    kind: str, rows: list[dict[str, Any]], of: dict[str, Any], out: Path | None, these: "Ranks"
) -> None:
    from longrope.files.atomic import write_atomically

    if not (out and these.first):
        return
    write_atomically(out / f"{kind}.json", json.dumps({"of": of, kind: rows}, indent=1) + "\n")
    if kind in ("passkey", "needle"):
        from longrope.report import plots

        plots.save_figure(plots.retrieval_figure(rows, kind), out / f"{kind}.png")


def _show(
    kind: str,
    rows: list[dict[str, Any]] | None,
    show: Callable[[list[dict[str, Any]]], None],
    out: Path | None,
    json_: bool,
) -> None:
    if rows is None:
        return
    if json_:
        print_json({kind: rows})
        return
    show(rows)
    if out and (figure := out / f"{kind}.png").exists():
        console.print(str(figure), soft_wrap=True)


def _original(model: str, named: str | None, how: ExecutionConfig) -> Any:
    """Load the model that ``evaluate benchmarks`` compares with; None is the same weights."""
    from longrope.checkpoints.run_directory import original_of
    from longrope.models.load import load_model

    source: dict[str, Any] | None = {"source": named} if named else original_of(model)
    alone = how.model_copy(update={"sequence_parallel": 1})
    return load_model(execution=alone, **source) if source is not None else None
