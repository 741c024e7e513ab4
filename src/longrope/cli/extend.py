"""The verbs that extend a model, and try the result."""

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from longrope.cli.app import app
from longrope.cli.options import (
    Chunk,
    Data,
    Device,
    Dtype,
    ExistingScaling,
    Json,
    OriginalLength,
    SequenceParallel,
    TrustRemoteCode,
    existing_choice,
)
from longrope.cli.tables import console, print_json

log = logging.getLogger(__name__)


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
    lora: Annotated[
        int | None, typer.Option(help="Train by LoRA of this rank, embeddings and norms in full.")
    ] = None,
    start_tokens: Annotated[
        int | None,
        typer.Option(help="First tokens left unscaled (n̂); no engine but ours applies them."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Decides everything that is by chance.")] = None,
    device: Device = None,
    dtype: Annotated[
        str | None, typer.Option(help="As for search; by default the recipe's, or auto.")
    ] = None,
    sequence_parallel: SequenceParallel = 1,
    existing_scaling: ExistingScaling = None,
    original_length: OriginalLength = None,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what each stage would cost, count --data, stop.")
    ] = False,
    memory: Annotated[
        str | None, typer.Option(help="With --dry-run: plan for GPUs of so many GB, such as 8x80.")
    ] = None,
    json_: Json = False,
) -> None:
    """Extend a model: search, fine-tune, search again, recover, export, prove, report."""
    from longrope.distributed import ranks
    from longrope.pipeline.checks import check_settings, check_text
    from longrope.pipeline.estimate import dry_run as estimate
    from longrope.pipeline.extend import extend as run_extension
    from longrope.pipeline.extend import open_run
    from longrope.pipeline.recipe import resolve_recipe

    if memory is not None and not dry_run:
        raise ValueError(f"--memory is {memory}: what to plan for; it goes with --dry-run")
    chosen = resolve_recipe(
        recipe,
        model,
        target=target,
        data=data,
        evaluation_data=evaluation_data,
        start_tokens=start_tokens,
        seed=seed,
        device=device,
        dtype=dtype,
        existing_scaling=existing_choice(existing_scaling),
        original_length=original_length,
        trust_remote_code=trust_remote_code or None,
        finetune=finetune,
        lora=lora,
    )
    directory = out or Path("runs") / f"{Path(chosen.model).name}-{chosen.target}"
    with ranks(sequence_parallel) as these:
        run = open_run(chosen, directory, these)
        if lora is not None and run.plan.trained is None:
            raise ValueError(f"--lora is {lora} and nothing is trained up to 8x: give --finetune")
        estimated = estimate(run.plan, run.info, chosen, memory, these)
        if these.first and not json_:
            console.print(estimated.table())
            if estimated.advice:
                console.print(estimated.advice, soft_wrap=True)
        if dry_run:
            if json_:
                print_json(estimated.to_json())
            estimated.check()
            if memory is None:  # which plans for another machine
                check_settings(run, [s for s in run.plan.stages if not run.done(s.name)])
            try:
                check_text(run, run.plan.stages)
            except ValueError as error:
                if chosen.data:
                    raise
                log.warning("the text is not there yet: %s", error)
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
def generate(
    model: Annotated[str, typer.Argument(help="What extend wrote, or any model.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from, after the file's.")] = "",
    prompt_file: Annotated[Path | None, typer.Option(help="A long text to read first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Decides what is drawn.")] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    chunk: Chunk = None,
    existing_scaling: ExistingScaling = None,
    original_length: OriginalLength = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Go on from a text of any length, tokens as they come."""
    from longrope.data.documents import read_text
    from longrope.inference.generate import decode_stream, stream
    from longrope.inference.load import load_extended

    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(
            f"--max-new-tokens is {max_new_tokens} and --temperature {temperature}; the first must "
            "be at least 1, the second not negative"
        )
    text = (read_text(prompt_file) if prompt_file else "") + prompt
    if not text:
        raise ValueError("--prompt is empty; give some text, or a --prompt-file")
    loaded, pair = load_extended(
        model,
        device=device,
        dtype=dtype,
        existing_scaling=existing_choice(existing_scaling),
        original_length=original_length,
        trust_remote_code=trust_remote_code,
    )
    ids = loaded.tokenizer(text, verbose=False)["input_ids"]
    tokens = stream(
        loaded,
        pair.choose if pair else None,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chunk=chunk,
    )
    for part in decode_stream(loaded, tokens):
        print(part, end="", flush=True)
    print()
