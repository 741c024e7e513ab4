"""The verbs `extend` and `generate`."""

import contextlib
import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from longrope.cli.app import app
from longrope.cli.options import (
    ExistingScaling,
    Json,
    OptionalData,
    OriginalLength,
    add_options,
    option_name,
)
from longrope.cli.tables import console, print_json
from longrope.execution import ExecutionConfig

log = logging.getLogger(__name__)


@app.command()
@add_options("execution", {"Execution": ExecutionConfig})
def extend(
    *,
    model: Annotated[
        str | None,
        typer.Argument(help="Directory, hub id or GGUF file. Default: the recipe's, or 'bundled'."),
    ] = None,
    target: Annotated[str | None, typer.Option(help="Target length: 131072, 128k or 64x.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="YAML file, or the name of a shipped recipe.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory; an interrupted run resumes.")
    ] = None,
    data: OptionalData = None,
    evaluation_data: Annotated[
        list[str] | None, typer.Option(help="Held-out documents. Default: some of --data.")
    ] = None,
    finetune: Annotated[
        bool | None, typer.Option(help="Force fine-tuning on or off. Default: on beyond 8x.")
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(
            help="Train with LoRA of this rank; embeddings and norms are trained in full."
        ),
    ] = None,
    start_tokens: Annotated[
        int | None,
        typer.Option(help="Start tokens left unscaled (n̂); only longrope applies them."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.")] = None,
    execution: dict[str, Any],
    existing_scaling: ExistingScaling = None,
    original_length: OriginalLength = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the cost of each stage, check --data, and stop."),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(help="With --dry-run: GPUs to plan for, in GB, such as 80 or 8x80."),
    ] = None,
    json_: Json = False,
) -> None:
    """Extend a model (search, fine-tune, recover, export, evaluate), and print the results.

    Stages: search, fine-tune, search again, recover, export, evaluate, report.
    """
    from longrope.distributed import Ranks, SequenceParallelGroup, ranks
    from longrope.pipeline.checks import check_settings, check_text
    from longrope.pipeline.estimate import dry_run as estimate
    from longrope.pipeline.extend import extend as run_extension
    from longrope.pipeline.extend import open_run
    from longrope.pipeline.recipe import resolve_recipe

    if memory is not None and not dry_run:
        raise ValueError(f"--memory is {memory}, but applies only with --dry-run")
    ExecutionConfig.make(execution, option_name)
    chosen = resolve_recipe(
        recipe,
        model,
        target=target,
        data=data,
        evaluation_data=evaluation_data,
        start_tokens=start_tokens,
        seed=seed,
        existing_scaling=existing_scaling,
        original_length=original_length,
        finetune={"enabled": finetune, "lora": lora},
        execution=execution,
    )
    directory = out or Path("runs") / f"{Path(chosen.model).name}-{chosen.target}"
    group_size = chosen.execution.sequence_parallel
    if memory is not None:  # the plan is for another machine, whose processes are not here
        joined = contextlib.nullcontext(Ranks(0, group_size, SequenceParallelGroup(0, group_size)))
    else:
        joined = ranks(group_size)
    with joined as these:
        run = open_run(chosen, directory, these)
        if lora is not None and run.plan.trained is None:
            raise ValueError(f"--lora is {lora}, but up to 8x nothing is trained; add --finetune")
        estimated = estimate(run.plan, run.info, chosen, memory, these)
        if these.first and not json_:
            console.print(estimated.table())
            if estimated.advice:
                console.print(estimated.advice, soft_wrap=True)
        if dry_run:
            if json_:
                print_json(estimated.to_json())
            estimated.check()
            if memory is None:  # with --memory the plan is for another machine
                check_settings(run, [s for s in run.plan.stages if not run.done(s.name)])
            try:
                check_text(run, run.plan.stages)
            except ValueError as error:
                if chosen.data:
                    raise
                log.warning("no usable text yet: %s", error)
            return
        page = run_extension(chosen, directory, these)
    if not these.first:
        return
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    if json_:
        print_json(results)
        return
    from longrope.report.sections import headline

    for line in headline(results):
        console.print(f"- {line}", highlight=False, soft_wrap=True)
    console.print(str(page), soft_wrap=True)


@app.command()
@add_options(
    "execution",
    {"Execution": ExecutionConfig},
    leave_out=("offload_activations", "sequence_parallel"),
)
def generate(
    *,
    model: Annotated[str, typer.Argument(help="Run of `extend`, or any model.")],
    prompt: Annotated[str, typer.Option(help="Prompt; appended to the prompt file.")] = "",
    prompt_file: Annotated[Path | None, typer.Option(help="Text file with a long prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of new tokens.")] = 200,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    execution: dict[str, Any],
    existing_scaling: ExistingScaling = None,
    original_length: OriginalLength = None,
) -> None:
    """Generate text from a prompt of any length, and print it token by token."""
    from longrope.data.documents import read_text
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
    loaded, pair = load_extended(
        model,
        ExecutionConfig.make(execution, option_name),
        existing_scaling=existing_scaling,
        original_length=original_length,
    )
    ids = loaded.tokenizer(text, verbose=False)["input_ids"]
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
