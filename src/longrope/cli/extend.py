"""The verbs `demo`, `plan`, `extend` and `generate`."""

import contextlib
import dataclasses
import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import Field
from rich.table import Table

from longrope.cli.app import app
from longrope.cli.options import (
    DATA_HELP,
    EXECUTION,
    FIELD_HELP,
    SCALING,
    Json,
    ScalingOptions,
    add_options,
    examples,
    option_name,
)
from longrope.cli.tables import console, print_json
from longrope.execution import ExecutionConfig

if TYPE_CHECKING:
    from longrope.pipeline.estimate import Estimate
    from longrope.pipeline.recipe import Recipe
    from longrope.pipeline.run_state import Run

log = logging.getLogger(__name__)

Source = Annotated[
    str | None,
    typer.Argument(
        help="Directory, hub id or GGUF file; by default the recipe's.", metavar="MODEL"
    ),
]


class ExtensionOptions(ScalingOptions):
    """The options that ``plan`` and ``extend`` share: a recipe, and changes of it."""

    target: str | None = Field(
        default=None,
        description="Target length in tokens: 131072, 128k or 64x; by default the recipe's.",
    )
    recipe: str | None = Field(
        default=None, description="YAML file with settings, or the name of a shipped recipe."
    )
    effort: Literal["quick", "standard", "paper"] | None = Field(
        default=None,
        description="How much to search, train and measure; chooses every setting that is not "
        "given. By default standard.",
    )
    data: list[str] | None = Field(default=None, description=DATA_HELP)
    field: str | None = Field(default=None, description=FIELD_HELP)
    eval_data: list[str] | None = Field(
        default=None, description="Held-out text; by default some of --data."
    )
    finetune: bool | None = Field(
        default=None, description="Force fine-tuning on or off; by default on beyond 8x."
    )
    lora: int | None = Field(
        default=None,
        description="Train with LoRA of this rank; embeddings and norms are trained in full.",
    )
    start_tokens: int | None = Field(
        default=None, description="Start tokens left unscaled (n̂); only longrope applies them."
    )
    seed: int | None = Field(default=None, description="Random seed.")
    set: list[str] | None = Field(
        default=None,
        description="Any key of the recipe as KEY=VALUE, such as finetune.steps=400; repeatable.",
    )


def _describes_an_extension(verb: Callable[..., None]) -> Callable[..., None]:
    """Give ``plan`` and ``extend`` the options that describe an extension."""
    return add_options("execution", EXECUTION)(add_options("options", {"": ExtensionOptions})(verb))


@app.command(
    epilog=examples(
        "longrope plan Qwen/Qwen3-1.7B-Base --target 512k --gpus 1x24GB",
        "longrope plan --recipe mistral-7b --data books/ --set finetune.steps=200",
    )
)
@_describes_an_extension
def plan(
    *,
    model: Source = None,
    options: dict[str, Any],
    gpus: Annotated[
        str | None,
        typer.Option(help="GPUs to plan for instead of this machine: 80GB or 8x80GB."),
    ] = None,
    execution: dict[str, Any],
    json_: Json = False,
) -> None:
    """Print the stages of an extension with tokens, FLOPs, memory and hours; check the text."""
    from longrope.distributed import Ranks, SequenceParallelGroup, ranks
    from longrope.pipeline.advice import advise_target
    from longrope.pipeline.checks import check_settings, check_text
    from longrope.pipeline.estimate import estimate_plan, parse_gpus
    from longrope.pipeline.extend import open_run

    chosen = _recipe(model, options, execution)
    memory = None if gpus is None else parse_gpus(gpus)
    if memory is not None:  # the plan is for another machine, whose processes are not here
        size = chosen.execution.sequence_parallel
        joined = contextlib.nullcontext(Ranks(0, size, SequenceParallelGroup(0, size)))
    else:
        joined = ranks(chosen.execution.sequence_parallel)
    with joined as these:
        run = open_run(chosen, _directory(chosen), these, gpus=memory, resume=False)
        _require_training(options, run.plan.trained)
        estimated = estimate_plan(run.plan, run.info, run.recipe, memory, these)
        if these.first and json_:
            settings = [dataclasses.asdict(choice) for choice in run.choices]
            print_json(estimated.to_json() | {"settings": settings})
        elif these.first:
            _print_plan(run, estimated)
            for line in advise_target(run.recipe, run.plan):
                console.print(line, soft_wrap=True)
        estimated.check()
        if gpus is None:
            check_settings(run, run.plan.stages)
        try:
            check_text(run, run.plan.stages)
        except ValueError as error:
            if chosen.data:
                raise
            log.warning("no usable text yet: %s", error)
        if these.first and not json_:
            command = _extend_command(sys.argv, bool(chosen.data), _directory(chosen))
            console.print(f"Next: {command}", soft_wrap=True)


@app.command(
    epilog=examples(
        "longrope extend Qwen/Qwen3-1.7B-Base --target 8x --data books/ --out runs/q",
        "longrope extend --recipe mistral-7b --data books/ --set finetune.steps=200",
    )
)
@_describes_an_extension
def extend(
    *,
    model: Source = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run directory, by default runs/MODEL-TARGET; the command resumes it."),
    ] = None,
    options: dict[str, Any],
    execution: dict[str, Any],
    json_: Json = False,
) -> None:
    """Extend a model in all stages, and print the results. Run again to resume.

    Stages: search, fine-tune, search again, recover, export, evaluate, report.
    """
    chosen = _recipe(model, options, execution)
    _extend(chosen, out or _directory(chosen), options, json_)


@app.command(
    epilog=examples(
        "longrope demo",
        "longrope demo --out runs/mine --device cpu",
    )
)
@add_options("execution", EXECUTION)
def demo(
    *,
    out: Annotated[Path, typer.Option(help="Run directory; the command resumes it.")] = Path(
        "runs/demo"
    ),
    execution: dict[str, Any],
    json_: Json = False,
) -> None:
    """Extend the small model in the package from 256 to 16,384 tokens: minutes on 2 cores.

    Its text is the source of this machine's Python library.
    """
    _extend(_recipe(None, {"recipe": "bundled", "effort": "quick"}, execution), out, {}, json_)


def _recipe(model: str | None, options: dict[str, Any], execution: dict[str, Any]) -> "Recipe":
    """Return the recipe that the options of ``plan`` and ``extend`` ask for."""
    from longrope.pipeline.recipe import resolve_recipe

    ExecutionConfig.make(execution, option_name)
    given = dict(options)
    finetune = {"enabled": given.pop("finetune", None), "lora": given.pop("lora", None)}
    return resolve_recipe(
        given.pop("recipe", None),
        model,
        settings=given.pop("set", ()),
        finetune=finetune,
        execution=execution,
        **given,
    )


def _directory(chosen: "Recipe") -> Path:
    return Path("runs") / f"{Path(chosen.model).name}-{chosen.target}"


def _require_training(options: dict[str, Any], trained: int | None) -> None:
    if options.get("lora") is not None and trained is None:
        raise ValueError(
            f"--lora is {options['lora']}, but up to 8x nothing is trained; add --finetune"
        )


def _extend_command(arguments: list[str], has_text: bool, out: Path) -> str:
    """Return the command that runs what ``plan`` was called for, ready to paste."""
    words = ["longrope", "extend"]
    given = iter(arguments[2:])
    for word in given:
        if word == "--gpus":
            next(given)
        elif word != "--json" and not word.startswith("--gpus="):
            words.append(word)
    words += [] if has_text else ["--data", "TEXT"]
    return shlex.join([*words, "--out", str(out)])


def _print_plan(run: "Run", estimated: "Estimate") -> None:
    """Print a run's plan: the settings that the effort chose, with reasons, then the stages."""
    recipe = run.recipe
    text = ", ".join(recipe.data) or "none given"
    console.print(f"{recipe.model} to {recipe.target}; text: {text}")
    if run.choices:
        table = Table("setting", "value", "reason", title=f"Settings of --effort {recipe.effort}")
        for choice in run.choices:
            table.add_row(choice.key, str(choice.value), choice.reason)
        console.print(table)
    console.print(estimated.table())
    for note in estimated.notes:
        console.print(note, soft_wrap=True)


def _extend(chosen: "Recipe", directory: Path, options: dict[str, Any], json_: bool) -> None:
    """Run an extension, after printing its plan; print the results on the first process."""
    from longrope.distributed import ranks
    from longrope.pipeline.estimate import estimate_plan
    from longrope.pipeline.extend import extend as run_extension
    from longrope.pipeline.extend import open_run

    with ranks(chosen.execution.sequence_parallel) as these:
        run = open_run(chosen, directory, these)
        _require_training(options, run.plan.trained)
        estimated = estimate_plan(run.plan, run.info, run.recipe, None, these)
        if these.first and not json_:
            _print_plan(run, estimated)
        page = run_extension(chosen, directory, these, run)
        if not these.first:
            return
    from longrope.files.parse import read_json

    results = read_json(directory / "results.json")
    if json_:
        print_json(results)
        return
    from longrope.report.headline import headline

    for line in headline(results):
        console.print(f"- {line}", soft_wrap=True)
    console.print(str(page), soft_wrap=True)


@app.command(
    epilog=examples(
        "longrope generate runs/llama --prompt-file book.txt",
        "longrope generate runs/llama --prompt 'Once upon a time' --temperature 0.8",
    )
)
@add_options("scaling", SCALING)
@add_options("execution", EXECUTION, leave_out=("offload_activations", "sequence_parallel"))
def generate(
    *,
    model: Annotated[str, typer.Argument(help="Run of `extend`, or any model.")],
    prompt: Annotated[str, typer.Option(help="Prompt; appended to the prompt file.")] = "",
    prompt_file: Annotated[Path | None, typer.Option(help="Text file with a long prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of new tokens.")] = 200,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    scaling: dict[str, Any],
    execution: dict[str, Any],
) -> None:
    """Generate text from a prompt of any length, and print it token by token."""
    from longrope.data.documents import read_text
    from longrope.data.encoding import encode_prompt
    from longrope.inference.generate import decode_tokens, generate_tokens
    from longrope.inference.load import load_extended

    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(
            f"--max-new-tokens is {max_new_tokens} and --temperature {temperature}; the first must "
            "be at least 1, the second not negative"
        )
    text = (read_text(prompt_file) if prompt_file else "") + prompt
    if not text:
        raise ValueError("--prompt is empty; give a prompt or a --prompt-file")
    loaded, pair = load_extended(model, ExecutionConfig.make(execution, option_name), **scaling)
    ids = encode_prompt(loaded.tokenizer, text)
    tokens = generate_tokens(
        loaded,
        pair.choose if pair else None,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    for part in decode_tokens(loaded, tokens):
        print(part, end="", flush=True)
    print()
