"""What is refused before an extension, a search or a measurement begins, as it would fail later."""

from collections.abc import Sequence
from typing import Any

import torch

from longrope.data.prompts import require_room
from longrope.distributed import Ranks, local_device
from longrope.models.compatibility import warn_if_out_of_reach
from longrope.models.devices import find_device, find_offload_target
from longrope.models.info import ModelInfo
from longrope.models.target import parse_extension
from longrope.pipeline.costs import Costs, Stage
from longrope.pipeline.estimate import available, check_memory
from longrope.pipeline.evaluation import benchmark_options
from longrope.pipeline.recipe import Recipe, make_recipe
from longrope.pipeline.run_state import Run
from longrope.pipeline.splits import Splits
from longrope.search.problem import require_start_tokens
from longrope.train.trainer import require_lora


def preflight(run: Run) -> None:
    """Refuse what cannot work: memory, devices, text, stages out of order.

    Raises:
        ValueError: names what is wrong and what helps.
    """
    recipe, plan = run.recipe, run.plan
    done = [run.done(stage.name) for stage in plan.stages]
    todo = [stage for stage, is_done in zip(plan.stages, done, strict=True) if not is_done]
    for stage, is_done in zip(plan.stages, done, strict=True):
        later = plan.stages.index(stage) > plan.stages.index(todo[0])
        if is_done and later and stage.kind not in ("evaluate", "report"):
            raise ValueError(
                f"{run.directory(stage.name)} was made from an earlier {todo[0].name}, which is "
                "gone; delete it too, and it is made again"
            )
    check_settings(run, todo)
    if recipe.evaluate.benchmarks:
        benchmark_options(run).require_data(run.tokenizer, plan.original)
    device = find_device("--device", local_device(recipe.device))
    memory = available(device, run.ranks.size, recipe.offload_activations)
    check_memory([stage for stage in todo if stage.memory], memory)
    loaded = run.original()  # what cannot be extended is refused before all the text is read
    if run.ranks.first:
        warn_if_out_of_reach(loaded.model, loaded.info, plan.target)
    check_text(run, todo)
    run.keep_splits()


def check_search(info: ModelInfo, recipe: Recipe, ranks: Ranks) -> None:
    """Refuse the search alone that a recipe asks for, before any weight is read.

    Raises:
        ValueError: a device that is not there, or too little memory; names the option that helps.
    """
    device = _devices(recipe)
    cost = Costs(info, recipe, device.type == "cpu", ranks.team.size)
    stage = cost.search("search", parse_extension(recipe.target, info))
    check_memory(
        [stage], available(device, offload_activations=recipe.offload_activations), options=True
    )


def check_measuring(info: ModelInfo, longest: int, how: dict[str, Any], ranks: Ranks) -> None:
    """Refuse forwards of sequences of up to ``longest`` tokens, before any weight is read.

    Args:
        how: ``dtype``, ``device``, ``chunk``, ``offload``, ``offload_activations`` of a recipe.

    Raises:
        ValueError: a device that is not there, or too little memory; names the option that helps.
    """
    # A chunk that is not given halves by itself on a GPU.
    recipe = make_recipe(how | {"target": str(longest), "chunk": how["chunk"] or 2048})
    device = _devices(recipe)
    if info.quantized:  # its weights are smaller than its numbers say
        return
    cost = Costs(info, recipe, device.type == "cpu", ranks.team.size)
    stage = cost.forwards("measuring", "evaluate", longest, 1)
    check_memory(
        [stage], available(device, offload_activations=recipe.offload_activations), options=True
    )


def _devices(recipe: Recipe) -> torch.device:
    """The device to work on; see that this and the one to wait on are there."""
    device = find_device("--device", local_device(recipe.device))
    if recipe.offload_activations:
        find_offload_target("--offload-activations", recipe.offload_activations)
    return device


def check_settings(run: Run, stages: Sequence[Stage]) -> None:
    """Refuse what these processes cannot do, by the recipe alone.

    Raises:
        ValueError: names the recipe's key, its value and the remedy.
    """
    recipe = run.recipe
    require_start_tokens(recipe.start_tokens, run.info)
    if any(stage.kind == "export" for stage in stages):
        run.info.check_representable(recipe.existing_scaling, run.plan.original)
    if recipe.offload_activations:
        find_offload_target("offload_activations", recipe.offload_activations)
    if any(stage.kind == "finetune" for stage in stages):
        _, _, number = (recipe.device or "").partition("cuda:")
        if number not in ("", "0"):
            raise ValueError(
                f"device is {recipe.device}, and training takes the first GPU that it sees: leave "
                f"it out, and set CUDA_VISIBLE_DEVICES={number}"
            )
        recipe.finetune.accumulation(run.ranks.size)
        if recipe.finetune.lora is not None:
            require_lora(recipe.finetune.lora)
    if recipe.evaluate.benchmarks:
        benchmark_options(run).check(run.info)


def check_text(run: Run, stages: Sequence[Stage]) -> Splits:
    """Share the text out; refuse too little, or lengths that do not hold the pass keys asked for.

    Raises:
        ValueError: says how many tokens there are and how many are needed.
    """
    splits = run.splits
    for stage in stages:
        if field := _asks(run.recipe, stage):
            require_room(field, run.tokenizer, stage.length)
    return splits


def _asks(recipe: Recipe, stage: Stage) -> str:
    """The recipe's key that asks for pass keys in a stage, if any does."""
    if stage.kind == "finetune" and recipe.finetune.passkey_share:
        shorter = stage.name == "settle" and recipe.finetune.settle_length
        return "finetune.settle_length, or passkey_share" if shorter else "finetune.passkey_share"
    if stage.kind != "search":
        return ""
    key, section = recipe.section(stage.name)
    asks = section.config.passkey_prompts and section.method == "search"
    return f"{key}.passkey_prompts" if asks else ""
