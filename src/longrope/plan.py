"""The plan of an extension: its stages and what each will cost, known before any runs."""

import dataclasses
import math

from longrope.evaluate.perplexity import check_lengths
from longrope.facts import ModelFacts
from longrope.gradient import graph_bytes, is_kept
from longrope.recipe import Recipe
from longrope.windows import parse_extension, parse_length

# Beyond this no training is needed (the paper: 8x without fine-tuning), and with it the
# second search reaches this much further.
STEP = 8
# The furthest first search of the paper: LLaMA2 from 4k to 256k.
FURTHEST = 64


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: its directory's name, what it does, and its cost.

    ``tokens`` go through the model in all, in windows of ``length``; ``linear`` and
    ``attention`` are FLOPs; ``memory`` bytes at the peak, of which ``replicated`` are on every
    device whatever is shared out over them.
    """

    name: str
    kind: str
    length: int
    forwards: int
    tokens: int = 0
    linear: float = 0.0
    attention: float = 0.0
    memory: int = 0
    steps: int = 0
    replicated: int = 0


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


def make_plan(facts: ModelFacts, recipe: Recipe, *, on_cpu: bool = False) -> ContextPlan:
    """The stages for a target, each with its cost; on a GPU, or on a CPU.

    Raises:
        ValueError: the target is no extension, or further than one fine-tuning reaches.
    """
    target = parse_extension(recipe.target, facts)
    original = facts.original_max_position_embeddings
    assert original is not None
    trains = recipe.finetune.enabled
    if trains is None:
        trains = target > STEP * original
    if not trains and target > STEP * original:
        raise ValueError(
            f"--target is {target:,}, {target / original:g} times the original length; beyond "
            f"{STEP}x a model must be fine-tuned: leave finetune.enabled null or true"
        )
    trained = None
    if trains:
        trained = _trained_length(recipe, original, target)
        if trained > FURTHEST * original:
            raise ValueError(
                f"--target is {target:,}, {target / original:g} times the original length; one "
                f"extension reaches {FURTHEST * STEP}x ({FURTHEST * STEP * original:,}): extend "
                "its result again"
            )
    cost = _Costs(facts, recipe, on_cpu)
    stages = []
    tuning = recipe.finetune
    if trained is not None and tuning.through is not None:
        through = parse_length(tuning.through, original)
        if not original < through < trained:
            raise ValueError(
                f"finetune.through is {through:,}; it must lie between the original length, "
                f"{original:,}, and the one that is trained at, {trained:,}"
            )
        stages.append(cost.search("through-search", through))
        stages.append(cost.training("through-finetune", tuning.through_steps, through))
    stages.append(cost.search("search", trained or target))
    if trained is not None:
        stages.append(cost.training("finetune", tuning.steps, trained))
        if trained < target:
            stages.append(cost.search("second-search", target))
            if tuning.settle_steps:
                length = _settled_length(recipe, original, trained)
                stages.append(cost.training("settle", tuning.settle_steps, length))
        elif tuning.settle_steps:
            raise ValueError(
                f"finetune.settle_steps is {tuning.settle_steps}, steps after a second search, and "
                f"this plan trains at the target, {target:,}: make it 0, or finetune.length shorter"
            )
    if recipe.recovery.enabled:
        for times in (1, 2):
            if times * original < target:
                stages.append(cost.search(f"recovery-{times}", times * original))
        stages.append(cost.choice(stages[-1]))
    stages.append(Stage("export", "export", target, 0, memory=cost.weights))
    stages.append(cost.evaluation(original, trained or target, target))
    stages.append(Stage("report", "report", target, 0))
    return ContextPlan(original, trained, target, tuple(stages))


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


def _settled_length(recipe: Recipe, original: int, trained: int) -> int:
    if recipe.finetune.settle_length is None:
        return trained
    length = parse_length(recipe.finetune.settle_length, original)
    if not original < length <= trained:
        raise ValueError(
            f"finetune.settle_length is {length:,}; it must be beyond the original length, "
            f"{original:,}, and at most the one that is trained at, {trained:,}"
        )
    return length


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


class _Costs:
    """FLOPs and bytes of a model's forwards and training steps."""

    def __init__(self, facts: ModelFacts, recipe: Recipe, on_cpu: bool):
        self.facts, self.recipe, self.on_cpu = facts, recipe, on_cpu
        self.dtype = facts.dtype if recipe.dtype == "auto" else recipe.dtype
        self.size = {"float32": 4, "float64": 8}.get(self.dtype, 2)
        self.weights = facts.parameters * self.size

    def search(self, name: str, length: int) -> Stage:
        _, section = self.recipe.section(name)
        each = section.samples + section.passkeys
        searches = section.method == "search"
        forwards = section.settings(self.recipe).forwards * each if searches else 0
        stage = self._forwards(name, "search", length, forwards)
        if searches and section.algorithm == "fast":
            if self.dtype == "float16":
                raise ValueError(
                    f"dtype is float16, too small for the slopes of {name}; make it bfloat16, or "
                    "its algorithm paper"
                )
            more = self._gradient_memory(length)
            stage = dataclasses.replace(stage, memory=stage.memory + more)
        return stage

    def training(self, name: str, steps: int, length: int) -> Stage:
        tuning = self.recipe.finetune
        pieces = steps * tuning.batch
        # Forward and twice that backward; with checkpointing the forward once again.
        passes = 4 if tuning.gradient_checkpointing else 3
        linear, attention = (passes * pieces * flops for flops in self.facts.forward_flops(length))
        original = self.facts.original_max_position_embeddings or 0
        windows = round(tuning.short_share * length / original)  # beside a piece
        taught = tuning.distill and windows > 0
        more = self.facts.forward_flops(original)
        times = (passes + taught) * windows * pieces  # the teacher's forward
        short = windows * original
        teacher = self.weights if taught else 0
        return Stage(
            name,
            "finetune",
            length,
            pieces,
            pieces * (length + short),
            linear + times * more[0],
            attention + times * more[1],
            self._training_memory(length + short, taught) + teacher,
            steps,
            teacher,
        )

    def choice(self, recovery: Stage) -> Stage:
        """Both short sets and the long one at both lengths."""
        forwards = 6 * self.recipe.recovery.samples
        return self._forwards("recovery", "choose", recovery.length, forwards)

    def evaluation(self, original: int, trained: int, target: int) -> Stage:
        """Perplexity at every length for every method, and retrieval; benchmarks are not priced.

        At the lengths of recovery also without it, and of the unscaled model.
        """
        section = self.recipe.evaluate
        lengths = evaluation_lengths(self.recipe, original, target)
        others, unasked = len(section.methods), 1 + ("none" not in section.methods)
        forwards, tokens, linear, attention = 0, 0, 0.0, 0.0
        for length in lengths:
            trials = section.passkey_trials if length <= trained else section.passkey_trials_beyond
            methods = others + 1 + (unasked if length <= 2 * original else 0)
            count = methods * section.documents * (target // length)
            count += trials + others * section.passkey_trials_others + section.needle_trials
            one = self.facts.forward_flops(length)
            forwards, tokens = forwards + count, tokens + count * length
            linear, attention = linear + count * one[0], attention + count * one[1]
        memory = self._forward_memory(target)
        return Stage("evaluate", "evaluate", target, forwards, tokens, linear, attention, memory)

    def _forwards(self, name: str, kind: str, length: int, forwards: int) -> Stage:
        linear, attention = (forwards * flops for flops in self.facts.forward_flops(length))
        memory = self._forward_memory(length)
        return Stage(name, kind, length, forwards, forwards * length, linear, attention, memory)

    def _forward_memory(self, length: int) -> int:
        """The long forward: weights, and per token hidden states, one layer's KV and angles."""
        facts = self.facts
        per_token = 2 * facts.kv_heads * facts.head_dim + 2 * facts.head_dim
        if self.recipe.hidden_device is None:
            per_token += facts.hidden_size
        chunk = min(length, self.recipe.chunk)
        work = chunk * 12 * facts.hidden_size * self.size
        return self._held() + length * (per_token * self.size + 24) + work + _head(facts)

    def _held(self) -> int:
        """Weights that are on the device at a time: all, or what is no layer and two layers.

        On a CPU converted ones are all in its memory: only the files themselves are mapped.
        """
        facts = self.facts
        mapped = self.dtype == facts.dtype and not facts.source.endswith(".gguf")
        if self.recipe.offload is None or (self.on_cpu and not mapped):
            return self.weights
        outside = (1 if facts.tied else 2) * facts.vocabulary * facts.hidden_size * self.size
        return outside + 2 * (self.weights - outside) // facts.layers

    def _gradient_memory(self, length: int) -> int:
        """The long gradient, beside a long forward: a chunk's graph, and of every layer its input
        and attention's output; the slopes of hidden states, and of one layer's keys and values.
        """
        facts = self.facts
        chunk = min(length, self.recipe.chunk)
        chunks = -(-length // chunk)
        kept = not self.recipe.offload and is_kept(facts.layers, facts.hidden_size, length, chunks)
        graph = graph_bytes(facts.layers if kept else 1, facts.hidden_size, chunk)
        width = facts.hidden_size + facts.heads * facts.head_dim
        inputs = 0 if self.recipe.hidden_device else (facts.layers + 1) * width
        # One layer's keys and values: a copy for the graph, its slopes, their float32 sums.
        both = 2 * facts.kv_heads * facts.head_dim
        return int(graph) + length * ((inputs + 2 * both) * self.size + 4 * both)

    def _training_memory(self, tokens: int, taught: bool) -> int:
        """Weights, gradients and Adam's two moments, and what the backward pass keeps.

        With checkpointing a hidden state per layer and token, and one layer whole; ``tokens`` are
        a piece's and its short windows'. What is ``taught`` is probabilities beside logits.
        """
        facts, tuning = self.facts, self.recipe.finetune
        master = 2 if tuning.precision == "pure-bf16" else 4
        half = 4 if tuning.precision == "float32" else 2
        states = facts.parameters * master * 4
        if tuning.lora is not None:
            states = facts.parameters * master + facts.vocabulary * facts.hidden_size * 32
        kept = facts.layers * facts.hidden_size
        layer = 24 * facts.hidden_size
        if not tuning.gradient_checkpointing:
            kept, layer = facts.layers * 24 * facts.hidden_size, 0
        head = _head(facts) * (2.5 if taught else 1)
        return int(states + tuning.micro_batch * tokens * (kept + layer) * half + head)


def _head(facts: ModelFacts) -> int:
    """A thousand rows of logits in float32, and their gradient."""
    return 2 * 1024 * facts.vocabulary * 4
