"""The command line: each verb reads its options, calls one function, prints.

Nothing heavy is imported before a verb runs, so that ``--help`` is instant.
"""

import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from longrope.options import (
    AttentionFactor,
    Chunk,
    Data,
    Device,
    Dtype,
    ExistingScaling,
    Field,
    HiddenDevice,
    Json,
    Lengths,
    Model,
    OriginalLength,
    Pack,
    TokensPerDocument,
    TrustRemoteCode,
)

app = typer.Typer(
    name="longrope",
    help="Extend the context window of any RoPE language model.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
_STOPPED = "stopped; it goes on where it was when the same command runs again"
# click's, which some versions of typer carry themselves
_UsageError: Any = typer.BadParameter.__base__


def main() -> None:
    """Run the program: a user's mistake is one line on standard error and exit code 2."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("longrope: %(message)s"))
    logging.getLogger("longrope").addHandler(handler)
    arguments = sys.argv[1:] or ["--help"]
    if os.environ.get("LONGROPE_TRACEBACK"):
        app(arguments)
    code = 0
    try:
        code = app(arguments, standalone_mode=False)
    except _UsageError as error:
        _fail(error.format_message(), 2)
    except ValueError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail(_STOPPED, 130)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":
            _fail("the GPU is out of memory; try --hidden-device cpu, or a smaller --chunk", 1)
        if type(error).__name__ != "RankLost":
            raise
        _fail(str(error), 1)
    if code == 130:  # typer's word for Ctrl-C
        _fail(_STOPPED, code)
    sys.exit(code)


def _fail(message: str, code: int) -> None:
    print("longrope: error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    # The other ranks of a run may wait in a collective: leave without asking them.
    sys.stdout.flush()
    os._exit(code)


@app.command()
def inspect(
    model: Model = "bundled",
    existing_scaling: ExistingScaling = None,
    original_length: OriginalLength = None,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Show what a model is, and whether its context can be extended. Reads no weights."""
    from longrope.model import inspect_model

    facts = inspect_model(
        model,
        existing_scaling=_existing(existing_scaling),
        original_length=original_length,
        trust_remote_code=trust_remote_code,
    )
    if json_:
        _print_json(dataclasses.asdict(facts))
        return
    table = Table(show_header=False, box=None)
    for name, value in dataclasses.asdict(facts).items():
        if name not in ("base_factors", "base_attention_factor"):
            shown = f"{value:,}" if isinstance(value, int) and name != "extendable" else str(value)
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
    algorithm: Annotated[str, typer.Option(help="paper: LongRoPE's Algorithm 1.")] = "paper",
    budget: Annotated[
        int | None, typer.Option(help="Evaluations at most; by default the settings' 1,344.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many generations without a new best.")
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
    chunk: Chunk = 2048,
    hidden_device: HiddenDevice = None,
    existing_scaling: ExistingScaling = None,
    original_length: OriginalLength = None,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Search the rescale factors for a longer context. Run again, it resumes."""
    from longrope.model import load_model
    from longrope.parallel import local_device, ranks
    from longrope.search.evolution import EvolutionSettings
    from longrope.search.stage import SearchOptions, SearchSettings, search_factors, summary

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
            algorithm=algorithm,
            budget=budget,
            patience=patience,
            seed=seed,
            chunk=chunk,
            hidden_device=hidden_device,
            settings=EvolutionSettings(
                population, mutations, crossovers, probability, iterations, parents
            ),
        ),
    )
    loaded = load_model(
        model,
        device=local_device(device),
        dtype=dtype,
        existing_scaling=_existing(existing_scaling),
        original_length=original_length,
        trust_remote_code=trust_remote_code,
        check=options.check,
    )
    with ranks() as these:
        result = search_factors(loaded, options, these)
    if not these.first:
        return
    if json_:
        _print_json(summary(result, out))
        return
    state = "done" if result.computed else "already done"
    console.print(f"{state}: {result.evaluations} evaluations; loss in nats per token:")
    for name, loss in result.starts.items():
        console.print(f"  {name:9} {loss:.4f}")
    console.print(f"  best      {result.best_loss:.4f}  (start tokens {result.best.start_tokens})")
    if result.portable_loss is not None:
        console.print(f"  portable  {result.portable_loss:.4f}  (start tokens 0)")
    if result.not_finite:
        console.print(f"  {result.not_finite} candidates had no finite loss")
    console.print(f"{out / 'rescale.json'}", soft_wrap=True)


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
    trials: Annotated[int, typer.Option(help="Questions a length, depths stratified.")] = 20,
    digits: Annotated[int, typer.Option(help="Of the number that is asked for.")] = 5,
    seed: Annotated[int, typer.Option(help="Decides keys and depths.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Directory for the heat map.")] = None,
    lengths: Lengths = ...,  # type: ignore[assignment]
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
    chunk: Chunk = 2048,
    hidden_device: HiddenDevice = None,
    existing_scaling: ExistingScaling = None,
    original_length: OriginalLength = None,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Measure perplexity or retrieval at one or more lengths under one rescale."""
    from longrope.evaluate.ask import AskOptions, ask, save_heat_map
    from longrope.evaluate.compare import CompareOptions, Entry, run_comparison
    from longrope.generate import load_extended
    from longrope.model import load_model

    if passkey and needle:
        raise ValueError("--passkey and --needle: ask for one at a time")
    kind = "passkey" if passkey else "needle" if needle else "perplexity"
    options = CompareOptions(
        methods=(rescale or "none",),
        lengths=tuple(lengths.split(",")),
        target=target,
        data=tuple(data or ()),
        field=field,
        pack=pack,
        stride=stride,
        tokens_per_document=tokens_per_document,
        attention_factor=attention_factor,
        chunk=chunk,
        hidden_device=hidden_device,
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
        hidden_device=hidden_device,
    )
    loading: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "original_length": original_length,
        "trust_remote_code": trust_remote_code,
        "check": options.check if kind == "perplexity" else asked.check,
    }
    pair = None
    if rescale is None and existing_scaling is None:
        loaded, pair = load_extended(model, **loading)
    else:
        scaling = _existing(existing_scaling)
        loaded = load_model(model, existing_scaling=scaling, **loading)
    entry = Entry("longrope", pair.choose) if pair else options.entries(loaded.facts)[0]
    if kind == "perplexity":
        rows = run_comparison(loaded, options, exclude_searched=False, entries=[entry]).rows()
        if json_:
            _print_json({"perplexity": rows})
        else:
            _print_rows(rows)
        return
    answers = ask(loaded, asked, entry.rescale)
    figure = save_heat_map(answers, kind, out) if out else None
    if json_:
        _print_json({kind: [dataclasses.asdict(row) for row in answers]})
    else:
        _print_answers(answers)
    if figure and not json_:
        console.print(str(figure), soft_wrap=True)


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
            help="Directory for compare.json and the plots; by default the rescale file's."
        ),
    ] = None,
    data: Data = None,
    field: Field = "text",
    pack: Pack = False,
    tokens_per_document: TokensPerDocument = None,
    attention_factor: AttentionFactor = None,
    device: Device = None,
    dtype: Dtype = "auto",
    chunk: Chunk = 2048,
    hidden_device: HiddenDevice = None,
    existing_scaling: ExistingScaling = None,
    original_length: OriginalLength = None,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Compare methods and searched factors on documents that no search has seen."""
    from longrope.evaluate.compare import CompareOptions, run_comparison
    from longrope.model import load_model
    from longrope.report.run import report as write_report

    options = CompareOptions(
        methods=tuple(methods.split(",")),
        lengths=tuple((lengths or target).split(",")),
        target=target,
        data=tuple(data or ()),
        field=field,
        pack=pack,
        tokens_per_document=tokens_per_document,
        attention_factor=attention_factor,
        chunk=chunk,
        hidden_device=hidden_device,
        own_attention_factors=True,
    )
    loaded = load_model(
        model,
        device=device,
        dtype=dtype,
        existing_scaling=_existing(existing_scaling),
        original_length=original_length,
        trust_remote_code=trust_remote_code,
        check=options.check,
    )
    comparison = run_comparison(loaded, options, exclude_searched=True)
    directory = out or options.directory
    comparison.save(directory / "compare.json")
    figures = write_report(directory)
    if json_:
        _print_json(comparison.to_json() | {"figures": [str(path) for path in figures]})
        return
    _print_rows(comparison.rows())
    _print_differences(comparison.differences())
    for path in figures:
        console.print(str(path), soft_wrap=True)


@app.command()
def extend(
    model: Annotated[
        str | None, typer.Argument(help="As for search; by default the recipe's, or 'bundled'.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Tokens to reach: 131072, 128k, 64x.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A YAML file, or the name of one that longrope carries.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the run; resumes it.")] = None,
    data: Data = None,
    evaluation_data: Annotated[
        list[str] | None, typer.Option(help="Documents to evaluate on; by default some of --data.")
    ] = None,
    finetune: Annotated[
        bool | None, typer.Option(help="Train, or not, whatever the target needs.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Decides everything that is by chance.")] = None,
    device: Device = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what each stage would cost, and stop.")
    ] = False,
    memory: Annotated[
        str | None, typer.Option(help="With --dry-run: plan for so many GB, such as 8x80.")
    ] = None,
    json_: Json = False,
) -> None:
    """Extend a model: search, fine-tune, search again, recover, export, prove, report."""
    from longrope.cost import dry_run as estimate
    from longrope.extend import extend as run_extension
    from longrope.extend import open_run
    from longrope.parallel import ranks
    from longrope.recipe import resolve_recipe

    chosen = resolve_recipe(
        recipe,
        model,
        target=target,
        data=data,
        evaluation_data=evaluation_data,
        seed=seed,
        device=device,
        finetune=finetune,
    )
    directory = out or Path("runs") / f"{Path(chosen.model).name}-{chosen.target}"
    with ranks() as these:
        run = open_run(chosen, directory, these)
        estimated = estimate(run.plan, run.facts, chosen, memory if dry_run else None)
        if these.first and not json_:
            console.print(estimated.table())
        if dry_run:
            if json_:
                _print_json(estimated.to_json())
            estimated.check()
            return
        page = run_extension(chosen, directory, these)
    if not these.first:
        return
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    if json_:
        _print_json(results)
        return
    from longrope.report.page import headline

    for line in headline(results):
        console.print(f"- {line}", highlight=False, soft_wrap=True)
    console.print(str(page), soft_wrap=True)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="What extend wrote, or any model.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from, after the file's.")] = "",
    prompt_file: Annotated[Path | None, typer.Option(help="A long text to read first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Decides what is drawn.")] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    chunk: Chunk = 2048,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Go on from a text of any length, tokens as they come."""
    from longrope.data import read_text
    from longrope.generate import load_extended, stream, text_of

    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(
            f"--max-new-tokens is {max_new_tokens} and --temperature {temperature}; the first must "
            "be at least 1, the second not negative"
        )
    text = (read_text(prompt_file) if prompt_file else "") + prompt
    loaded, pair = load_extended(
        model, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    ids = loaded.tokenizer(text, verbose=False)["input_ids"]
    tokens = stream(
        loaded,
        pair,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chunk=chunk,
    )
    for part in text_of(loaded, tokens):
        print(part, end="", flush=True)
    print()


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="What extend, search or compare wrote to.")],
    json_: Json = False,
) -> None:
    """Write a run's page again, or draw a search's and a comparison's pictures."""
    from longrope.report.page import write_page
    from longrope.report.run import report as draw

    written = write_page(directory) if (directory / "results.json").exists() else draw(directory)
    if json_:
        _print_json({"figures": [str(path) for path in written]})
    else:
        for path in written:
            console.print(str(path), soft_wrap=True)


def _existing(choice: str | None) -> Any:
    if choice not in (None, "keep", "replace"):
        raise ValueError(f"--existing-scaling {choice}: choose keep or replace")
    return choice


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def _print_rows(rows: list[dict[str, Any]]) -> None:
    table = Table("length", "method", "perplexity", "± s.e.", "tail", "tokens", "windows")
    for row in rows:
        table.add_row(
            f"{row['length']:,}",
            row["method"],
            _shown(row["perplexity"], ".3f"),
            _shown(row["standard_error"], ".3f"),
            _shown(row.get("tail_perplexity"), ".3f"),
            f"{row['tokens']:,}",
            str(row["windows"]),
        )
    console.print(table)


def _print_answers(rows: Any) -> None:
    from longrope.evaluate.retrieval import totals, wilson

    table = Table("length", "right", "of", "share", "95% interval")
    for length, (right, trials) in totals(rows).items():
        low, high = wilson(right, trials)
        shares = f"{right / trials:.0%}", f"{low:.0%} – {high:.0%}"
        table.add_row(f"{length:,}", str(right), str(trials), *shares)
    console.print(table)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _print_differences(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    title = f"{rows[0]['method']} less each other, nats per token, paired by document"
    table = Table("length", "against", "difference", "± s.e.", "better", title=title)
    for row in rows:
        table.add_row(
            f"{row['length']:,}",
            row["against"],
            _shown(row["mean"], "+.4f"),
            _shown(row["standard_error"], ".4f"),
            "yes" if row["better"] else "no",
        )
    console.print(table)
