"""Plan an extension: which stages run, in which order, at which lengths."""

import dataclasses
import math

from longrope.models.info import ModelInfo
from longrope.models.target_length import parse_extension
from longrope.pipeline.costs import Costs, Stage
from longrope.pipeline.recipe import Recipe
from longrope.units import check_lengths, parse_length

# A search alone extends this far (the paper: 8x without fine-tuning), and the second search
# extends the fine-tuned length by as much again.
STEP = 8
# The largest scale of a first search in the paper: LLaMA2 from 4k to 256k.
FURTHEST = 64
# The shortest training sequence, in tokens.
SHORTEST = 16


@dataclasses.dataclass(frozen=True)
class ContextPlan:
    """Plan of an extension: its lengths and stages from the original length to the target.

    ``trained`` is the fine-tuning length, or None where nothing is trained.
    """

    original: int
    trained: int | None
    target: int
    stages: tuple[Stage, ...]

    @property
    def first(self) -> int:
        """Length that the plan's stage ``search`` is for, in tokens."""
        return self.trained or self.target

    def __contains__(self, name: str) -> bool:
        return any(stage.name == name for stage in self.stages)

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def before(self, name: str, kind: str) -> str | None:
        """Return the name of the plan's last stage of ``kind`` before stage ``name``, or None."""
        earlier = self.stages[: self.stages.index(self[name])]
        return next((stage.name for stage in reversed(earlier) if stage.kind == kind), None)


def make_plan(
    info: ModelInfo, recipe: Recipe, *, on_cpu: bool = False, group_size: int = 1
) -> ContextPlan:
    """Return the plan for a recipe, each stage with its cost for one process.

    Raises:
        ValueError: the target is not beyond the original length, or further than one
            fine-tuning reaches.
    """
    target = parse_extension(recipe.target, info)
    original = info.original_max_position_embeddings
    assert original is not None
    trained = training_length(recipe, original, target)
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
    stages.append(cost.export(target))
    lengths = evaluation_lengths(recipe, original, target)
    stages.append(cost.evaluation(lengths, trained))
    stages.append(Stage("report", "report", target, 0))
    return ContextPlan(original, trained, target, tuple(stages))


def _training(cost: Costs, recipe: Recipe, original: int, trained: int, target: int) -> list[Stage]:
    """Plan the search and training stages up to the target."""
    recipe.check_training()
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
    length = _sequence_length("finetune", tuning.sequence_length, original, trained)
    stages.append(cost.training("finetune", tuning.steps, length))
    if trained == target:
        return stages
    stages.append(cost.search("second-search", target))
    if tuning.final.steps:
        given = tuning.final.sequence_length or tuning.sequence_length
        length = _sequence_length("finetune.final", given, original, trained)
        stages.append(cost.training("final-finetune", tuning.final.steps, length))
    return stages


def _sequence_length(section: str, given: str | None, original: int, trained: int) -> int:
    """Return the tokens of a training sequence.

    They may be fewer than the original length: only the positions need to reach far.
    """
    length = trained if given is None else parse_length(given, original)
    if not SHORTEST <= length <= trained:
        raise ValueError(
            f"{section}.sequence_length is {length:,}; it must be at least {SHORTEST} and at most "
            f"the training length, {trained:,}"
        )
    return length


def training_length(recipe: Recipe, original: int, target: int) -> int | None:
    """Return the length that a plan trains for, in tokens; None if nothing is trained.

    Raises:
        ValueError: the target needs training that the recipe excludes, is too far for one
            training, or the recipe's length is out of range.
    """
    trains = recipe.finetune.enabled
    if trains is None:
        trains = target > STEP * original
    if not trains:
        if target > STEP * original:
            raise ValueError(
                f"target is {target:,}, {target / original:g} times the original length; beyond "
                f"{STEP}x a model must be fine-tuned: leave finetune.enabled null or true"
            )
        return None
    length = max(math.ceil(target / STEP), min(2 * original, target))
    if recipe.finetune.length is not None:
        length = parse_length(recipe.finetune.length, original)
        if not original < length <= target:
            raise ValueError(
                f"finetune.length is {length:,}; it must be beyond the original length, "
                f"{original:,}, and at most the target, {target:,}"
            )
    elif target <= STEP * original:
        length = target
    if length > FURTHEST * original:
        raise ValueError(
            f"target is {target:,}, {target / original:g} times the original length; one "
            f"extension reaches {FURTHEST * STEP}x ({FURTHEST * STEP * original:,}): extend "
            "its result again"
        )
    return length


def evaluation_lengths(recipe: Recipe, original: int, target: int) -> list[int]:
    """Plan the lengths to evaluate at: original, target, and the recipe's or doublings between.

    Raises:
        ValueError: the lengths cannot be scored on the same tokens.
    """
    if target % original:
        raise ValueError(
            f"target is {target:,}; lengths are compared on the same tokens, so it must be a "
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
