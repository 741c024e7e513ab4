"""Advice in words: which way suits a model and a target, and how much text it takes."""

import shlex
from collections.abc import Sequence

from longrope.models.info import ModelInfo
from longrope.pipeline.plan import STEP, ContextPlan
from longrope.pipeline.recipe import Recipe
from longrope.units import parse_length

# Up to this scale YaRN suffices (docs/results.md, SmolLM2 at 2x: 28.48 against 28.41).
CLOSED_FORM = 2
_CHARACTERS = 4  # of English text in one token, about


def advise_model(info: ModelInfo, options: Sequence[str] = ()) -> list[str]:
    """Return what to do with a model, for each range of targets.

    Args:
        options: of the command line, which say how the model is read.
    """
    original = info.original_max_position_embeddings
    if not info.extendable or original is None:
        return []
    if info.rope_scaling and "--rope-scaling" not in options:
        options = [*options, "--rope-scaling", "keep"]
    model = shlex.join([info.source, *options])
    return [
        f"Up to {CLOSED_FORM}x ({CLOSED_FORM * original:,} tokens) YaRN suffices, without a "
        "search: on four other books a search of SmolLM2 at 2x was 0.2% better "
        "(docs/results.md).",
        f"  longrope export {model} --long-factors yarn --target {CLOSED_FORM}x --out yarn-model",
        f"Up to {STEP}x ({STEP * original:,} tokens) search the factors; nothing is trained.",
        f"  longrope search {model} --target {STEP}x --data TEXT --out runs/search",
        f"Beyond {STEP}x extend: search, fine-tune, search again, recover the short context. See "
        "first what it costs.",
        f"  longrope plan {model} --target 32x --data TEXT",
    ]


def advise_target(recipe: Recipe, plan: ContextPlan) -> list[str]:
    """Return which way suits the target of a plan, and the text that it takes."""
    scale = plan.target / plan.original
    if scale <= CLOSED_FORM:
        way = (
            f"{scale:g}x: up to {CLOSED_FORM}x YaRN suffices; 'longrope export' with "
            "--long-factors yarn needs no text and no hours."
        )
    elif plan.trained is None:
        way = f"{scale:g}x: up to {STEP}x searched factors suffice, and nothing is trained."
    elif scale <= STEP:
        way = f"{scale:g}x: searched factors suffice, and the model is trained as asked."
    else:
        way = f"{scale:g}x: beyond {STEP}x factors alone do not suffice, so the model is trained."
    return [way, _text_needed(recipe, plan)]


def _text_needed(recipe: Recipe, plan: ContextPlan) -> str:
    """Return how much text a plan needs, at least and better."""
    evaluated = 0 if recipe.eval_data else plan.target
    training = 0
    if plan.trained is not None:
        tuning = recipe.finetune
        length = parse_length(tuning.sequence_length or plan.trained, plan.original)
        steps = tuning.steps + tuning.final.steps
        training = round(steps * tuning.batch * length * (1 - tuning.passkey_share))
    least = plan.target + evaluated + (plan.trained or 0)
    better = plan.target * recipe.search.config.windows
    better += evaluated * recipe.evaluate.documents + training
    return (
        f"Text: at least {least:,} tokens, better {better:,} ({_megabytes(better)} of plain text), "
        f"in documents of {plan.target:,} tokens or more where you have them."
    )


def _megabytes(tokens: int) -> str:
    size = tokens * _CHARACTERS / 1e6
    return f"about {size:,.0f} MB" if size >= 1 else "less than 1 MB"
