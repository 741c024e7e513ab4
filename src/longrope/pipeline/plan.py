"""The plan of an extension: its stages in order, known before any runs."""

import dataclasses
import math

from longrope.models.info import ModelInfo
from longrope.models.target import parse_extension
from longrope.pipeline.costs import Costs, Stage
from longrope.pipeline.recipe import Recipe
from longrope.units import check_lengths, parse_length

# Beyond this no training is needed (the paper: 8x without fine-tuning), and with it the
# second search reaches this much further.
STEP = 8
# The furthest first search of the paper: LLaMA2 from 4k to 256k.
FURTHEST = 64
# Tokens of the least that is worth training on.
SHORTEST = 16


@dataclasses.dataclass(frozen=True)
class ContextPlan:
    """From the original length to the target, by way of a fine-tuned one where there is one."""

    original: int
    trained: int | None
    target: int
    stages: tuple[Stage, ...]

    @property
    def first(self) -> int:
        """The length of the first search."""
        return self.trained or self.target

    def __contains__(self, name: str) -> bool:
        return any(stage.name == name for stage in self.stages)

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def before(self, name: str, kind: str) -> str | None:
        """The last stage of a kind before a named one."""
        earlier = self.stages[: self.stages.index(self[name])]
        return next((stage.name for stage in reversed(earlier) if stage.kind == kind), None)


def make_plan(
    info: ModelInfo, recipe: Recipe, *, on_cpu: bool = False, group_size: int = 1
) -> ContextPlan:
    """The stages for a target, each with its cost on a GPU or a CPU; of one process of a team.

    Raises:
        ValueError: the target is no extension, or further than one fine-tuning reaches.
    """
    target = parse_extension(recipe.target, info)
    original = info.original_max_position_embeddings
    assert original is not None
    trains = recipe.finetune.enabled
    if trains is None:
        trains = target > STEP * original
    if not trains and target > STEP * original:
        raise ValueError(
            f"--target is {target:,}, {target / original:g} times the original length; beyond "
            f"{STEP}x a model must be fine-tuned: leave finetune.enabled null or true"
        )
    trained = _trained_length(recipe, original, target) if trains else None
    if trained is not None and trained > FURTHEST * original:
        raise ValueError(
            f"--target is {target:,}, {target / original:g} times the original length; one "
            f"extension reaches {FURTHEST * STEP}x ({FURTHEST * STEP * original:,}): extend "
            "its result again"
        )
    cost = Costs(info, recipe, on_cpu, group_size)
    if trained is None:
        stages = [cost.search("search", target)]
    else:
        stages = _training(cost, recipe, original, trained, target)
    if recipe.recovery.enabled:
        for times in (1, 2):
            if times * original < target and (times == 1 or info.boundary is None):
                stages.append(cost.search(f"recovery-{times}", times * original))
        stages.append(cost.choice(stages[-1]))
    stages.append(Stage("export", "export", target, 0, memory=cost.weights))
    lengths = evaluation_lengths(recipe, original, target)
    stages.append(cost.evaluation(lengths, trained or target))
    stages.append(Stage("report", "report", target, 0))
    return ContextPlan(original, trained, target, tuple(stages))


def _training(cost: Costs, recipe: Recipe, original: int, trained: int, target: int) -> list[Stage]:
    """The searches towards the target, and the trainings between and after them."""
    tuning, stages = recipe.finetune, []
    if tuning.through is not None:
        through = parse_length(tuning.through, original)
        if not original < through < trained:
            raise ValueError(
                f"finetune.through is {through:,}; it must lie between the original length, "
                f"{original:,}, and the one that is trained at, {trained:,}"
            )
        stages.append(cost.search("through-search", through))
        stages.append(cost.training("through-finetune", tuning.through_steps, through))
    stages.append(cost.search("search", trained))
    stages.append(cost.training("finetune", tuning.steps, trained))
    if trained == target:
        return stages
    stages.append(cost.search("second-search", target))
    if tuning.settle_steps:
        length = trained
        if tuning.settle_length is not None:
            length = parse_length(tuning.settle_length, original)
            # May be shorter than the original length: it is the positions that reach far.
            if not SHORTEST <= length <= trained:
                raise ValueError(
                    f"finetune.settle_length is {length:,}; it must be at least {SHORTEST} and at "
                    f"most the length that is trained at, {trained:,}"
                )
        stages.append(cost.training("settle", tuning.settle_steps, length))
    return stages


def _trained_length(recipe: Recipe, original: int, target: int) -> int:
    if recipe.finetune.length is not None:
        length = parse_length(recipe.finetune.length, original)
        if not original < length <= target:
            raise ValueError(
                f"finetune.length is {length:,}; it must be beyond the original length, "
                f"{original:,}, and at most the target, {target:,}"
            )
        return length
    if target <= STEP * original:
        return target
    return max(math.ceil(target / STEP), min(2 * original, target))


def evaluation_lengths(recipe: Recipe, original: int, target: int) -> list[int]:
    """The lengths measured: the original and the target, and the recipe's or doublings between.

    Raises:
        ValueError: lengths that cannot be scored on the same tokens.
    """
    if target % original:
        raise ValueError(
            f"--target is {target:,}; lengths are compared on the same tokens, so it must be a "
            f"multiple of the original length, {original:,}, such as {target // original}x"
        )
    if recipe.evaluate.lengths:
        asked = {parse_length(text, original) for text in recipe.evaluate.lengths}
        lengths = sorted({original, *asked, target})
        if lengths[-1] > target:
            raise ValueError(f"evaluate.lengths: {lengths[-1]:,} is beyond the target, {target:,}")
        check_lengths(lengths)
        return lengths
    lengths = [original]
    while target % (2 * lengths[-1]) == 0 and 2 * lengths[-1] <= target:
        lengths.append(2 * lengths[-1])
    return sorted({*(length for length in lengths if target % length == 0), target})
