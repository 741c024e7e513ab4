"""`--effort`: choose every setting that the recipe does not give, each with its reason.

``quick`` and ``standard`` train a small share of the paper's tokens: on short sequences whose
positions reach beyond the target (PoSE, arXiv 2309.10400), beside short windows that are distilled
from the original model, and at last under the target's factors. ``paper`` is the paper's schedule.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from longrope.models.info import ModelInfo
from longrope.models.target_length import parse_extension
from longrope.pipeline.costs import Stage
from longrope.pipeline.estimate import Memory, problem
from longrope.pipeline.plan import SHORTEST, make_plan, training_length
from longrope.pipeline.recipe import Recipe, leaves, make_recipe
from longrope.train.config import FinetuneConfig
from longrope.units import gigabytes, parse_length

# The measured schedule that the rules scale (docs/results.md): 2.5 M parameters to 64x.
_PARAMETERS, _LEARNING_RATE = 2.5e6, 7e-4
# Tokens of training = _TOKENS · √parameters · doublings²: there 1.4 million; for 7B to 128k
# 51 million, where PoSE took 131 million.
_TOKENS = 25
# The learning rate falls with this power of the parameters, to the paper's 2e-5 for 7B.
_POWER = 0.45
# The batch is chosen so that training takes about this many steps. The last third of them are
# under the target's factors.
_STEPS = {"quick": 150, "standard": 380}
_SHARE = {"quick": 0.4, "standard": 1.0}
_SHORT_SHARE = 0.75
# A model below this size loses retrieval unless it is trained on passkey prompts.
_SMALL = 50_000_000
# More passes over a text gain little (Muennighoff et al., arXiv 2305.16264).
_EPOCHS = 4
_FEWEST_STEPS = 12
# Tokens of short sequences in one forward pass.
_TOGETHER = 4096
# Tokens of a training sequence at most, in multiples of the original length: the first that fits.
_LONGEST = (8, 4, 2, 1)
# Keys that searches of both algorithms have.
_SHARED_KEYS = {"windows", "passkey_prompts", "max_factor", "enabled"}
# What saves memory, in order: for training or not, the key, its value.
_SAVINGS = (
    (False, "execution.offload_activations", "cpu"),
    (False, "execution.offload_weights", True),
    (True, "finetune.lora", 64),
    (True, "finetune.precision", "pure-bf16"),
    (True, "finetune.distill", False),
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One setting that the effort chose: a key of the recipe, its value and the reason."""

    key: str
    value: Any
    reason: str


@dataclasses.dataclass(frozen=True)
class Situation:
    """What the choices depend on beside the recipe and the model.

    Args:
        memory: free memory to train in.
        text_tokens: tokens of the training split; None if no text is given yet.
        processes: processes that train together.
        on_cpu: whether the model is trained on a CPU.
    """

    memory: Memory
    text_tokens: int | None = None
    processes: int = 1
    on_cpu: bool = False


def choose_settings(recipe: Recipe, info: ModelInfo, situation: Situation) -> list[Choice]:
    """Return the settings that the recipe's effort chooses, without those that it gives.

    Raises:
        ValueError: the target cannot be planned.
    """
    if recipe.effort == "paper":
        return _fitted(recipe, info, situation, _paper(recipe, info))
    choices: list[Choice] = []
    for longest in _LONGEST:
        wanted = _standard(recipe, info, situation, longest)
        choices = _fitted(recipe, info, situation, wanted)
        if not _too_large(apply_choices(recipe, choices), info, situation, training=True):
            break
    return choices


def _fitted(
    recipe: Recipe, info: ModelInfo, situation: Situation, wanted: Iterable[Choice]
) -> list[Choice]:
    """Return the wanted choices that the recipe leaves open, and those that make them fit."""
    choices = [*wanted, *_numbers(recipe, info, situation)]
    choices = without_given(choices, recipe)
    choices += _to_fit(apply_choices(recipe, choices), info, situation, recipe)
    return list({choice.key: choice for choice in choices}.values())  # the last of each key


def _numbers(recipe: Recipe, info: ModelInfo, situation: Situation) -> Iterator[Choice]:
    """Choose the dtypes of the model and of the training."""
    if info.dtype == "float16":
        reason = "the range of the checkpoint's float16 is too small for gradients"
        yield Choice("execution.dtype", "bfloat16", reason)
    target, original = parse_extension(recipe.target, info), info.original_max_position_embeddings
    if training_length(recipe, original or 0, target) is not None:
        precision = FinetuneConfig().precision_on("cpu" if situation.on_cpu else "cuda")
        on_gpu = "products in bfloat16, weights in float32"
        reason = "most CPUs are slow in bfloat16" if situation.on_cpu else on_gpu
        yield Choice("finetune.precision", precision, reason)


def without_given(choices: list[Choice], recipe: Recipe) -> list[Choice]:
    """Return the choices of settings that the recipe leaves open."""
    given = leaves(recipe.given())
    return [choice for choice in choices if _is_free(choice.key, given)]


def apply_choices(recipe: Recipe, choices: list[Choice]) -> Recipe:
    """Return the recipe with its chosen settings."""
    content = recipe.given()
    for choice in choices:
        *sections, name = choice.key.split(".")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = choice.value
    return make_recipe(content)


def _is_free(key: str, given: Collection[str]) -> bool:
    """Return whether the effort may choose a key.

    If the recipe gives a method or a setting of one algorithm for a search, the effort chooses only
    the settings that both algorithms have.
    """
    section, _, name = key.partition(".")
    if section in ("search", "second_search", "recovery") and name not in _SHARED_KEYS:
        own = {other.partition(".")[2] for other in given if other.startswith(f"{section}.")}
        if own - _SHARED_KEYS:
            return False
    return key not in given


def _standard(
    recipe: Recipe, info: ModelInfo, situation: Situation, longest: int
) -> Iterator[Choice]:
    """Choose the settings of ``quick`` and ``standard``.

    ``longest`` limits the training sequences, as a multiple of the original length.
    """
    effort, original = recipe.effort, info.original_max_position_embeddings or 0
    target = parse_extension(recipe.target, info)
    trained = training_length(recipe, original, target)
    quick = effort == "quick"
    if quick:
        yield Choice("search.windows", 2, "quick: fewer windows than the default 5")
        yield Choice("search.budget", 12, "quick: the starting ramps and a few gradient steps")
        yield Choice("recovery.budget", 12, "quick: as for the search")
        reason = "quick: without windows of other kinds of text, and without validation"
        yield Choice("search.transfer", "none", reason)
        yield Choice("recovery.transfer", "none", reason)
    yield Choice("recovery.windows", 6 if quick else 12, "windows at the original length are cheap")
    if trained is not None:
        yield from _second_search(quick)
        yield from _training(recipe, info, situation, original, trained, target, longest)
    yield from _evaluation(quick, target)


def _second_search(quick: bool) -> Iterator[Choice]:
    if quick:
        reason = "quick: after the final fine-tuning it equals the search (docs/results.md)"
        yield Choice("second_search.method", "yarn", reason)
        return
    reason = "only its four starts: training under the winner matters more than the winner"
    yield Choice("second_search.algorithm", "evolution", reason)
    yield Choice("second_search.budget", 4, reason)
    yield Choice("second_search.population", 4, reason)
    yield Choice("second_search.windows", 1, "forward passes at the target take long")
    yield Choice("second_search.transfer", "none", "the starts follow from the first search")


def _training(
    recipe: Recipe,
    info: ModelInfo,
    situation: Situation,
    original: int,
    trained: int,
    target: int,
    longest: int,
) -> Iterator[Choice]:
    """Choose training: short sequences, as many tokens as the size asks for, few at a time."""
    tuning, size, group = recipe.finetune, info.parameters, situation.processes

    def settled(name: str, value: Any) -> Any:
        """Return the recipe's own value where it gives one."""
        return getattr(tuning, name) if name in tuning.model_fields_set else value

    small = size < _SMALL
    sequence = min(trained, max(SHORTEST, longest * original))
    reason = f"{longest} times the original: cheap attention, and sampled positions reach further"
    if sequence == trained:
        reason = "the training length"
    elif longest != _LONGEST[0]:
        reason = "longer sequences do not fit into the memory; sampled positions reach further"
    yield Choice("finetune.sequence_length", str(sequence), reason)
    sequence = parse_length(settled("sequence_length", str(sequence)), original)
    yield Choice("finetune.short_share", _SHORT_SHARE, "windows of the original length keep it")
    short_share = settled("short_share", _SHORT_SHARE)
    if short_share:
        yield Choice("finetune.distill", True, "these windows learn the original's predictions")
    reason = "a small model loses retrieval without" if small else "a larger model keeps retrieval"
    yield Choice("finetune.passkey_share", 0.4 if small else 0.0, reason)
    passkey_share = settled("passkey_share", 0.4 if small else 0.0)
    if passkey_share:
        yield Choice("finetune.answer_share", 0.03, "an answer has few tokens")

    doublings = math.log2(target / original)
    tokens = _SHARE[recipe.effort] * _TOKENS * math.sqrt(size) * doublings**2
    each = sequence * (1 + short_share)  # tokens of a sequence and its short windows
    group *= settled("micro_batch", 1)
    batch = max(1, round(tokens / _STEPS[recipe.effort] / each / group)) * group
    reason = f"about {_STEPS[recipe.effort]} steps: more steps teach more than larger ones"
    yield Choice("finetune.batch", batch, reason)
    batch = settled("batch", batch)
    steps = max(_FEWEST_STEPS, round(tokens / (batch * each)))
    reason = f"{tokens / 1e6:.3g} million tokens: {_TOKENS} · √parameters · doublings²"
    if _SHARE[recipe.effort] < 1:
        reason += f" · {_SHARE[recipe.effort]:g}"
    most = _most_steps(situation.text_tokens, batch * sequence * (1 - passkey_share))
    if most < steps:
        steps = max(_FEWEST_STEPS, int(most))
        reason = (
            f"{situation.text_tokens:,} tokens of text are read about {_EPOCHS} times; with more "
            f"text it would be {tokens / 1e6:.3g} million tokens"
        )
    first = steps - steps // 3 if trained < target else steps
    yield Choice("finetune.steps", first, reason)
    first = settled("steps", first)
    if trained < target:
        reason = "a third of all steps, under the factors for the target"
        yield Choice("finetune.final.steps", max(1, first // 2), reason)
    share = batch // situation.processes
    fitting = [n for n in range(1, share + 1) if share % n == 0 and n * sequence <= _TOGETHER]
    yield Choice("finetune.micro_batch", max(fitting, default=1), "sequences of a forward pass")
    rate = _LEARNING_RATE * (_PARAMETERS / size) ** _POWER
    yield Choice("finetune.learning_rate", float(f"{rate:.2g}"), "falls with the model's size")
    yield Choice("finetune.beta2", 0.95, "few steps need a short average")
    yield Choice("finetune.warmup", min(10, first // 4), "few steps")
    reason = "a small model's activations fit" if small else "its activations take much memory"
    yield Choice("finetune.gradient_checkpointing", not small, reason)
    yield Choice("finetune.save_every", 20, "little is repeated after an interruption")


def _most_steps(text_tokens: int | None, tokens_per_step: float) -> float:
    """Return the steps in the most passes over the text."""
    if text_tokens is None or not tokens_per_step:
        return math.inf
    return _EPOCHS * text_tokens / tokens_per_step


def _evaluation(quick: bool, target: int) -> Iterator[Choice]:
    """Choose the evaluation: cheap where one forward pass at the target takes minutes."""
    if quick:
        yield Choice("evaluate.methods", ["none", "yarn"], "quick: two of four known methods")
        yield Choice("evaluate.fine_tuned_methods", ["yarn"], "quick: one of two known methods")
    documents = 1 if quick else max(1, min(4, 2**19 // target))
    reason = "one at least, and up to four while they have half a million tokens"
    yield Choice("evaluate.documents", documents, "quick: one" if quick else reason)
    yield Choice("evaluate.passkey_trials", 5 if quick else 10, "few prompts, with their interval")
    beyond = 3 if quick or target > 2**18 else 10
    yield Choice("evaluate.passkey_trials_beyond", beyond, "longer prompts take longer")


def _paper(recipe: Recipe, info: ModelInfo) -> Iterator[Choice]:
    """Choose the paper's settings (sections 3.4 and 4.1) where they are not the defaults."""
    original = info.original_max_position_embeddings or 0
    target = parse_extension(recipe.target, info)
    trained = training_length(recipe, original, target)
    reason = "Algorithm 1 with the paper's population and generations"
    yield Choice("search.algorithm", "evolution", reason)
    yield Choice("recovery.algorithm", "evolution", reason)
    yield Choice("search.transfer", "none", "the paper's searches see one text")
    yield Choice("recovery.transfer", "none", "as for the search")
    yield Choice("recovery.windows", 20, "windows at the original length are cheap")
    defaults = FinetuneConfig()
    if trained is not None:
        yield Choice("second_search.algorithm", "evolution", reason)
        yield Choice("second_search.transfer", "none", "as for the search")
        if target > 2**19:
            reason = "the paper halves these beyond 512k"
            yield Choice("second_search.population", 32, reason)
            yield Choice("second_search.mutations", 8, reason)
            yield Choice("second_search.crossovers", 8, reason)
            yield Choice("second_search.windows", 3, reason)
        reason = "the paper's for LLaMA2"
        yield Choice("finetune.steps", defaults.steps, reason)
        yield Choice("finetune.batch", defaults.batch, reason)
        yield Choice("finetune.learning_rate", defaults.learning_rate, reason)
    yield Choice("evaluate.passkey_trials", 10, "the paper's")
    yield Choice("evaluate.passkey_trials_beyond", 10, "the paper's")


def _to_fit(recipe: Recipe, info: ModelInfo, situation: Situation, asked: Recipe) -> list[Choice]:
    """Choose what makes the stages fit into the memory, one setting after the other.

    Keys that the user ``asked`` for stay.
    """
    given = leaves(asked.given())
    found: list[Choice] = []
    memory = situation.memory
    for training, key, value in _SAVINGS:
        applies = not (key == "finetune.lora" and memory.devices > 1)  # FSDP cannot merge it
        applies &= not (key == "execution.offload_activations" and situation.on_cpu)
        too_large = _too_large(recipe, info, situation, training)
        if not too_large or not applies or key in given:
            continue
        worst = max(too_large, key=lambda stage: stage.memory)
        reason = (
            f"{worst.name} takes {gigabytes(memory.share(worst))} without, and "
            f"{gigabytes(memory.each)} are free"
        )
        if key == "finetune.lora" and importlib.util.find_spec("peft") is None:
            reason += "; needs pip install 'longrope[lora]'"
        found.append(Choice(key, value, reason))
        recipe = apply_choices(recipe, found[-1:])
    return found


def _too_large(
    recipe: Recipe, info: ModelInfo, situation: Situation, training: bool
) -> list[Stage]:
    """Return the stages, of training or all others, that do not fit into the memory."""
    return [
        stage
        for stage in make_plan(info, recipe, on_cpu=situation.on_cpu).stages
        if (stage.kind == "finetune") == training and problem(stage, situation.memory)
    ]
