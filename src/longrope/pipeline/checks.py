"""Checks before long work starts: devices, memory, text, settings, stage order."""

from collections.abc import Sequence

import torch

from longrope.data.documents import check_sources
from longrope.data.prompts import require_room
from longrope.data.windows import check_documents
from longrope.distributed import Ranks, local_device
from longrope.evaluate.benchmarks import check_benchmarks, require_benchmark_data
from longrope.execution import ExecutionConfig
from longrope.models.compatibility import warn_if_out_of_reach
from longrope.models.devices import find_device, find_offload_target
from longrope.models.info import ModelInfo
from longrope.models.target_length import parse_extension
from longrope.pipeline.costs import Costs, Stage
from longrope.pipeline.estimate import available, check_memory
from longrope.pipeline.evaluation import benchmark_config
from longrope.pipeline.recipe import Recipe, Search
from longrope.pipeline.run_state import Run
from longrope.pipeline.splits import Splits
from longrope.search.problem import require_start_tokens
from longrope.search.settings import EvolutionSearchConfig, GradientSearchConfig
from longrope.train.trainer import require_lora


def check_extension(run: Run) -> None:
    """Check before an extension starts that no stage of it will fail later.

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
    check_sources(recipe.data)
    if recipe.eval_data:
        check_sources(recipe.eval_data, "eval_data")
    if recipe.other_data:
        check_sources(recipe.other_data, "other_data")
    check_settings(run, todo)
    if recipe.evaluate.benchmarks.tasks:
        require_benchmark_data(benchmark_config(run), run.tokenizer, plan.original)
    device = find_device(local_device(recipe.execution.device))
    memory = available(device, run.ranks.size, recipe.execution.offload_activations)
    check_memory([stage for stage in todo if stage.memory], memory)
    loaded = run.original()  # refuses a model that cannot be extended before reading the text
    if run.ranks.first:
        warn_if_out_of_reach(loaded.model, loaded.info, plan.target)
    check_text(run, todo)
    run.keep_splits()


def check_search(
    info: ModelInfo,
    target: str,
    config: GradientSearchConfig | EvolutionSearchConfig,
    execution: ExecutionConfig,
    ranks: Ranks,
) -> None:
    """Check that a search has its device and enough memory, before any weights are read.

    Raises:
        ValueError: a missing device or too little memory; names the option that helps.
    """
    section = Search.model_validate(config.model_dump())
    recipe = Recipe(target=target, execution=execution, search=section)
    device = _device(execution)
    cost = Costs(info, recipe, device.type == "cpu", ranks.group.size)
    stage = cost.search("search", parse_extension(target, info))
    memory = available(device, offload_activations=execution.offload_activations)
    check_memory([stage], memory, options=True)


def check_evaluation(
    info: ModelInfo, longest: int, execution: ExecutionConfig, ranks: Ranks
) -> None:
    """Check that an evaluation has its device and enough memory, before any weights are read.

    Args:
        longest: largest length to evaluate at, in tokens.

    Raises:
        ValueError: a missing device or too little memory; names the option that helps.
    """
    # On a GPU a default chunk is halved when memory runs out, so assume a small one.
    assumed = {"chunk_size": execution.chunk_size or 2048}
    recipe = Recipe(target=str(longest), execution=execution.model_copy(update=assumed))
    device = _device(execution)
    if info.quantized:  # its weights take fewer bytes than parameters × dtype
        return
    cost = Costs(info, recipe, device.type == "cpu", ranks.group.size)
    stage = cost.forwards("measuring", "evaluate", longest, 1)
    memory = available(device, offload_activations=execution.offload_activations)
    check_memory([stage], memory, options=True)


def _device(execution: ExecutionConfig) -> torch.device:
    """Check that the device and the offload target exist, and return the device."""
    device = find_device(local_device(execution.device))
    if execution.offload_activations:
        find_offload_target(execution.offload_activations)
    return device


def check_settings(run: Run, stages: Sequence[Stage]) -> None:
    """Check the recipe's settings against the model and these processes, before a run starts.

    Raises:
        ValueError: names the recipe's key, its value and the remedy.
    """
    recipe = run.recipe
    require_start_tokens(recipe.start_tokens, run.info)
    if any(stage.kind == "export" for stage in stages):
        run.info.check_representable(recipe.rope_scaling, run.plan.original)
    if recipe.execution.offload_activations:
        find_offload_target(recipe.execution.offload_activations)
    if any(stage.kind == "finetune" for stage in stages):
        _, _, number = (recipe.execution.device or "").partition("cuda:")
        if number not in ("", "0"):
            raise ValueError(
                f"execution.device is {recipe.execution.device}, but training uses the first "
                f"visible GPU: leave it out and set CUDA_VISIBLE_DEVICES={number}"
            )
        recipe.finetune.accumulation(run.ranks.size)
        if recipe.finetune.lora is not None:
            require_lora(recipe.finetune.lora)
    if recipe.evaluate.benchmarks.tasks:
        check_benchmarks(benchmark_config(run))


def check_text(run: Run, stages: Sequence[Stage]) -> Splits:
    """Check that a run has enough text, and lengths that hold its passkey prompts.

    Returns the documents, split.

    Raises:
        ValueError: says how many tokens there are and how many are needed, or names a token that
            the model has no embedding for.
    """
    splits = run.splits
    for documents in (splits.search, splits.training, splits.evaluation, splits.other):
        check_documents(documents, run.info.vocabulary, (*splits.bos, splits.eos))
    for stage in stages:
        if field := _asks(run.recipe, stage):
            require_room(field, run.tokenizer, stage.length)
    return splits


def _asks(recipe: Recipe, stage: Stage) -> str:
    """Return the recipe key to name if a stage's passkey prompts do not fit.

    Empty if the stage has no passkey prompts.
    """
    if stage.kind == "finetune" and recipe.finetune.passkey_share:
        return "finetune.passkey_share"
    if stage.kind != "search":
        return ""
    key, section = recipe.section(stage.name)
    asks = section.config.passkey_prompts and section.method == "search"
    return f"{key}.passkey_prompts" if asks else ""
