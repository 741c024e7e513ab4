"""`longrope extend`: run every stage of an extension in order. Read this file first.

A recipe names a model and a target length. The plan lists the stages. Each stage writes its own
directory in the run, and later stages read it::

    search ─▶ finetune ─▶ second-search ─▶ recovery ─▶ export ─▶ evaluate ─▶ report
    factors   weights      factors for      factors     model/    results.json
    for L₁    at L₁        8 · L₁           for short             report.html

A recipe can fine-tune at a length on the way to L₁ (``through-search``, ``through-finetune``),
and once more under the second search's factors (``final-finetune``).

A finished stage writes ``done.json`` last and is skipped afterwards. An interrupted stage resumes
from what it has on disk. So the same command resumes the run, whatever ended it.
"""

import contextlib
import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

from longrope.checkpoints.hf import export_model
from longrope.checkpoints.manifest import Manifest
from longrope.checkpoints.run_directory import save_short_attention_factor
from longrope.data.documents import check_sources
from longrope.distributed import Ranks, local_device
from longrope.errors import RankLost
from longrope.files.atomic import require_directory
from longrope.files.lock import only_process
from longrope.labels import display_name
from longrope.models.devices import find_device
from longrope.models.info import inspect_model
from longrope.models.target_length import parse_extension
from longrope.pipeline.advice import advise_target
from longrope.pipeline.checks import check_extension
from longrope.pipeline.costs import Stage
from longrope.pipeline.effort import (
    Choice,
    Situation,
    apply_choices,
    choose_settings,
    without_given,
)
from longrope.pipeline.estimate import Memory, available
from longrope.pipeline.evaluation import evaluate_run
from longrope.pipeline.plan import ContextPlan, make_plan, training_length
from longrope.pipeline.recipe import Recipe, Search
from longrope.pipeline.recovery import choose
from longrope.pipeline.run_state import Run, recorded_choices
from longrope.progress import console
from longrope.report.page import write_page
from longrope.rope.pair import RescalePair
from longrope.rope.rescale import Rescale
from longrope.search.problem import (
    Problem,
    first_search_problem,
    multiplied,
    recovery_problem,
    second_search_factors,
    second_search_problem,
)
from longrope.search.run import describe_gain, search_stage
from longrope.train.dataset import LongContextDataset
from longrope.train.trainer import finetune

log = logging.getLogger(__name__)


def extend(recipe: Recipe, out: Path, ranks: Ranks | None = None, run: Run | None = None) -> Path:
    """Extend a model: run every stage of a recipe that is not done, and return the report's path.

    ``run`` is what :func:`open_run` returned for the same recipe, if it was called before.

    Leaves in ``out``: ``model/``, ``rescale.json`` (long) and ``short.json``, ``report.html``
    and ``report.md``, ``results.json``, ``recipe.yaml`` (resolved), and a directory per stage.

    Raises:
        ValueError: the recipe cannot work, memory or text is too small, or the directory holds
            another run. Raised before any long work.
    """
    ranks = ranks or Ranks()
    if ranks.group.size != recipe.execution.sequence_parallel:
        raise ValueError(
            f"execution.sequence_parallel is {recipe.execution.sequence_parallel}, but "
            f"{ranks.group.size} processes share each sequence: give ranks of such groups"
        )
    run = run or open_run(recipe, out, ranks)
    with only_process(out) if ranks.first else contextlib.nullcontext():
        claimed = ranks.first and run.claim()
        try:
            if not all(run.done(stage.name) for stage in run.plan.stages):
                check_extension(run)
        except (ValueError, RankLost):  # this process or another one refuses
            if claimed:  # the corrected command may describe another run
                run.unclaim()
            raise
        if ranks.first:
            run.remeasure()
            console.print(advise_target(run.recipe, run.plan)[0], soft_wrap=True)
        for stage in run.plan.stages:
            if run.done(stage.name):
                if ranks.first:
                    console.print(f"{stage.name}: done already")
                continue
            if ranks.first:
                console.rule(stage.name, align="left")
            started = time.monotonic()
            found = _WORK[stage.kind](run, stage)
            seconds = round(time.monotonic() - started, 1)
            counted = {"forwards": stage.forwards, "tokens": stage.tokens}
            run.finish(stage, counted | found | {"seconds": seconds})
    return out / "report.html"


def open_run(
    recipe: Recipe,
    out: Path,
    ranks: Ranks,
    *,
    gpus: Memory | None = None,
    resume: bool = True,
) -> Run:
    """Open an extension: inspect the model, choose the settings that are left, plan the stages.

    No weights are read and nothing is written.

    Args:
        gpus: GPUs to plan for, instead of this machine.
        resume: whether a started run in ``out`` keeps the settings that were chosen for it.

    Raises:
        ValueError: the model cannot be extended to this target, or ``out`` cannot be written.
    """
    require_directory(out)
    if recipe.data:
        check_sources(recipe.data)
    info = inspect_model(
        recipe.model,
        rope_scaling=recipe.rope_scaling,
        original_length=recipe.original_length,
        trust_remote_code=recipe.execution.trust_remote_code,
    )
    info.require_extendable()
    device = find_device(local_device(recipe.execution.device))
    on_cpu = device.type == "cpu" and gpus is None
    target, original = parse_extension(recipe.target, info), info.original_max_position_embeddings
    assert original is not None
    lengths = ContextPlan(original, training_length(recipe, original, target), target, ())
    run = Run(recipe, info, lengths, out, ranks)
    choices = recorded_choices(out) if resume and ranks.first else None
    if choices is None and ranks.first:
        processes = gpus.devices if gpus else ranks.size
        memory = gpus or available(device, ranks.size, recipe.execution.offload_activations)
        situation = Situation(memory, _training_tokens(run), processes, on_cpu)
        choices = choose_settings(recipe, info, situation)
    if gpus is None:  # else the processes of the plan are not here
        shared = ranks.broadcast([dataclasses.asdict(choice) for choice in choices or []])
        choices = [Choice(**choice) for choice in shared]
    choices = without_given(choices or [], recipe)
    recipe = apply_choices(recipe, choices)
    planned = make_plan(info, recipe, on_cpu=on_cpu, group_size=ranks.group.size)
    return run.planned(recipe, planned, choices)


def _training_tokens(run: Run) -> int | None:
    """Return the tokens of a run's training text; None if there is none, or no usable one."""
    try:
        return sum(map(len, run.splits.training)) if run.recipe.data else None
    except ValueError:  # reported when the text is checked
        return None


def _search(run: Run, stage: Stage) -> dict[str, Any]:
    """Run a search stage of an extension: for the training length, target, or short sequences."""
    section, problem = _problem(run, stage)
    directory = run.directory(stage.name)
    if section.method != "search":
        known = _known_factors(run, stage, section.method, problem)
        if run.ranks.first:
            known.save(directory / "rescale.json")
        return {"forwards": 0, "tokens": 0}
    loaded = run.model_before(stage.name)
    config, recipe = section.config, run.recipe
    windows = run.splits.search_windows(
        stage.length, config.windows, recipe.seed, config.own_validation_windows
    )
    result = search_stage(
        loaded,
        problem,
        windows,
        config,
        directory,
        run.ranks,
        seed=recipe.seed,
        title=stage.name,
    )
    if run.ranks.first:
        console.print(describe_gain(result))
    forwards = round(result.window_passes)
    return {
        "loss": result.best_loss,
        "starts": result.starts,
        "best_start": result.best_start and result.best_start[0],
        "gain": result.gain,
        "gain_standard_error": result.gain_standard_error,
        "evaluations": result.evaluations,
        "forwards": forwards,
        "tokens": forwards * stage.length,
    }


def _problem(run: Run, stage: Stage) -> tuple[Search, Problem]:
    recipe, factor = run.recipe, run.attention_factor(stage.length)
    key, section = recipe.section(stage.name)
    before = run.plan.before(stage.name, "search")
    if key == "recovery":
        exported = run.attention_factor(run.plan.target)
        return section, recovery_problem(run.info, run.rescale("search"), stage.length, exported)
    if before:
        return section, second_search_problem(
            run.info,
            run.rescale(before),
            stage.length,
            attention_factor=factor,
            max_factor=section.config.max_factor,
        )
    return section, first_search_problem(
        run.info,
        stage.length,
        attention_factor=factor,
        start_tokens=(recipe.start_tokens,),
        max_factor=section.config.max_factor,
    )


def _known_factors(run: Run, stage: Stage, method: str, problem: Problem) -> Rescale:
    """Return a known method's factors for an extension's search stage that searches nothing.

    The attention factor is that of a search.
    """
    if before := run.plan.before(stage.name, "search"):
        factors = second_search_factors(run.info, run.rescale(before), method, stage.length)
        return multiplied(problem.space.start, factors)
    known = run.info.rescale(method, stage.length)
    return known.replace(
        attention_factor=problem.space.start.attention_factor,
        start_tokens=run.recipe.start_tokens,
    )


def _finetune(run: Run, stage: Stage) -> dict[str, Any]:
    loaded = run.model_before(stage.name, offload=False)
    tuning, original = run.recipe.finetune, run.plan.original
    settings = tuning.model_copy(update={"steps": stage.steps})
    is_final, seed = stage.name == "final-finetune", run.recipe.seed
    searched = run.plan.before(stage.name, "search")
    assert searched is not None
    trained_for = run.plan[searched].length
    dataset = LongContextDataset(
        run.splits.training,
        loaded.tokenizer,
        stage.length,
        stage.steps * tuning.batch,
        reach=round(tuning.reach * trained_for) if stage.length < trained_for else 0,
        seed=seed + is_final,  # other sequences than fine-tuning's
        passkey_share=tuning.passkey_share,
        answer_share=tuning.answer_share,
        short=tuning.short_share * stage.length / original,
        short_length=original,
        batch=tuning.batch,
    )
    # Short windows are trained as they will be used: with the exported attention factor.
    short = run.info.rescale("none", original)
    short = short.replace(attention_factor=run.attention_factor(run.plan.target))
    teacher = run.teacher() if tuning.distill and dataset.has_short_windows else None
    lines = finetune(
        loaded,
        run.rescale(searched),
        short,
        dataset,
        settings,
        run.directory(stage.name),
        run.ranks,
        teacher=teacher,
        seed=seed,
    )
    run.forget()
    return {
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
        "epochs": dataset.epochs,
    }


def _choose(run: Run, stage: Stage) -> dict[str, Any]:
    """Run the stage of an extension that chooses the short-context factors."""
    names = [name for name in ("recovery-1", "recovery-2") if name in run.plan]
    loaded, recipe = run.trained(), run.recipe
    forward = loaded.forward()
    lengths = [run.plan[name].length for name in names]
    windows = {
        length: run.splits.search_windows(
            length, recipe.recovery.config.windows, recipe.seed + 1
        ).ids
        for length in lengths
    }
    choice = choose(
        forward,
        windows,
        [run.rescale(name) for name in names],
        run.long,
        free_attention_factor=run.info.base_attention_factor,
    )
    if run.ranks.first:
        choice.short.save(run.directory(stage.name) / "rescale.json")
    return choice.to_json() | {
        "starts": {run.plan[name].length: run.record(name)["starts"] for name in names}
    }


def _export(run: Run, stage: Stage) -> dict[str, Any]:
    pair, loaded = run.pair, run.trained()
    if run.ranks.first:
        portable = pair
        if not pair.long.portable:
            log.warning(
                "start_tokens is %d in rescale.json and applies in longrope only; no checkpoint "
                "format has a field for it, so RUN/model uses 0",
                pair.long.start_tokens,
            )
            portable = RescalePair(pair.short, pair.long.replace(start_tokens=0))
        manifest = Manifest("hf", display_name(run.recipe.model), portable)
        export_model(loaded, manifest, run.out / "model")
        pair.long.save(run.out / "rescale.json")
        pair.short.save(run.out / "short.json")
        found = run.record("recovery") if "recovery" in run.plan else {}
        save_short_attention_factor(run.out, found.get("short_attention_factor"))
    return {}


def _evaluate(run: Run, stage: Stage) -> dict[str, Any]:
    return evaluate_run(run, stage)


def _report(run: Run, stage: Stage) -> dict[str, Any]:
    if run.ranks.first:
        write_page(run.out)
    return {}


_WORK = {
    "search": _search,
    "finetune": _finetune,
    "choose": _choose,
    "export": _export,
    "evaluate": _evaluate,
    "report": _report,
}
