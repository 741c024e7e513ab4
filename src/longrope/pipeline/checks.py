"""Checks before long work starts: devices, memory, text, settings, stage order."""

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
    """Refuse an extension that would fail later.

    Raises:
        ValueError: too little memory or text, a missing device, or stages out of order. Names the
            problem and the remedy.
    """
    recipe, plan = run.recipe, run.plan
    done = [run.done(stage.name) for stage in plan.stages]
    todo = [stage for stage, is_done in zip(plan.stages, done, strict=True) if not is_done]
    for stage, is_done in zip(plan.stages, done, strict=True):
        later = plan.stages.index(stage) > plan.stages.index(todo[0])
        if is_done and later and stage.kind not in ("evaluate", "report"):
            raise ValueError(
                f"{run.directory(stage.name)} was made from an earlier {todo[0].name} that "
                "has been deleted; delete it too and run again"
            )
    check_settings(run, todo)
    if recipe.evaluate.benchmarks:
        benchmark_options(run).require_data(run.tokenizer, plan.original)
    device = find_device("--device", local_device(recipe.device))
    memory = available(device, run.ranks.size, recipe.offload_activations)
    check_memory([stage for stage in todo if stage.memory], memory)
    loaded = run.original()  # refuses a model that cannot be extended before reading the text
    if run.ranks.first:
        warn_if_out_of_reach(loaded.model, loaded.info, plan.target)
    check_text(run, todo)
    run.keep_splits()


def check_search(info: ModelInfo, recipe: Recipe, ranks: Ranks) -> None:
    """Refuse a search that does not fit, before any weights are read.

    Raises:
        ValueError: a missing device or too little memory; names the option that helps.
    """
    device = _devices(recipe)
    cost = Costs(info, recipe, device.type == "cpu", ranks.group.size)
    stage = cost.search("search", parse_extension(recipe.target, info))
    check_memory(
        [stage], available(device, offload_activations=recipe.offload_activations), options=True
    )


def check_measuring(info: ModelInfo, longest: int, how: dict[str, Any], ranks: Ranks) -> None:
    """Refuse an evaluation at up to ``longest`` tokens that does not fit, before weights are read.

    Args:
        how: the recipe keys ``dtype``, ``device``, ``chunk``, ``offload``, ``offload_activations``.

    Raises:
        ValueError: a missing device or too little memory; names the option that helps.
    """
    # On a GPU a default chunk is halved when memory runs out, so assume a small one.
    chunk = 2048 if how["chunk"] is None else how["chunk"]
    recipe = make_recipe(how | {"target": str(longest), "chunk": chunk})
    device = _devices(recipe)
    if info.quantized:  # its weights take fewer bytes than parameters × dtype
        return
    cost = Costs(info, recipe, device.type == "cpu", ranks.group.size)
    stage = cost.forwards("measuring", "evaluate", longest, 1)
    check_memory(
        [stage], available(device, offload_activations=recipe.offload_activations), options=True
    )


def _devices(recipe: Recipe) -> torch.device:
    """Return the device to compute on, after checking that it and the offload target exist."""
    device = find_device("--device", local_device(recipe.device))
    if recipe.offload_activations:
        find_offload_target("--offload-activations", recipe.offload_activations)
    return device


def check_settings(run: Run, stages: Sequence[Stage]) -> None:
    """Refuse settings that these processes cannot carry out.

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
                f"device is {recipe.device}, but training uses the first visible GPU: leave "
                f"it out and set CUDA_VISIBLE_DEVICES={number}"
            )
        recipe.finetune.accumulation(run.ranks.size)
        if recipe.finetune.lora is not None:
            require_lora(recipe.finetune.lora)
    if recipe.evaluate.benchmarks:
        benchmark_options(run).check()


def check_text(run: Run, stages: Sequence[Stage]) -> Splits:
    """Split the documents; refuse too little text, or lengths too short for passkey prompts.

    Raises:
        ValueError: says how many tokens there are and how many are needed.
    """
    splits = run.splits
    for stage in stages:
        if field := _asks(run.recipe, stage):
            require_room(field, run.tokenizer, stage.length)
    return splits


def _asks(recipe: Recipe, stage: Stage) -> str:
    """Return the recipe key that asks for passkey prompts in a stage, or an empty string."""
    if stage.kind == "finetune" and recipe.finetune.passkey_share:
        shorter = stage.name == "settle" and recipe.finetune.settle_length
        return "finetune.passkey_share" + " (with finetune.settle_length)" * bool(shorter)
    if stage.kind != "search":
        return ""
    key, section = recipe.section(stage.name)
    asks = section.config.passkey_prompts and section.method == "search"
    return f"{key}.passkey_prompts" if asks else ""
