"""The cost of each stage of an extension: FLOPs, tokens and memory."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from longrope.attention.backward import KEYS
from longrope.attention.chunked import query_block_size
from longrope.layerwise.activation_storage import is_directory
from longrope.layerwise.backward import graph_bytes, is_kept
from longrope.layerwise.forward import default_chunk_size, head_rows
from longrope.layerwise.split_attention import backward_bytes
from longrope.models.info import ModelInfo
from longrope.pipeline.recipe import Recipe
from longrope.search.cost import window_passes
from longrope.train.dataset import short_windows
from longrope.train.loss import ROWS

_OFFLOAD = "execution.offload_activations"


@dataclasses.dataclass(frozen=True)
class Stage:
    """Cost of one stage of a plan.

    Args:
        name: of the stage and its directory.
        kind: search, finetune, choose, export, evaluate or report.
        length: tokens in one sequence.
        forwards: number of sequences that go through the model.
        tokens: in all of these sequences.
        linear: FLOPs of products with weights.
        attention: FLOPs of attention.
        memory: peak bytes on the device.
        steps: of training.
        replicated: bytes of ``memory`` that every device holds under FSDP.
        unshared: bytes on every device before FSDP shards the model.
        host: bytes offloaded to the host's memory.
        disk: bytes offloaded to files.
        helps: recipe settings that lower the memory.
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
    unshared: int = 0
    host: int = 0
    disk: int = 0
    helps: tuple[str, ...] = ()


class Costs:
    """Costs of a recipe's stages: FLOPs and memory of forward passes and training steps."""

    def __init__(self, info: ModelInfo, recipe: Recipe, on_cpu: bool, group_size: int = 1):
        self.info, self.recipe, self.on_cpu = info, recipe, on_cpu
        kind, execution = "cpu" if on_cpu else "cuda", recipe.execution
        self.chunk_size = execution.chunk_size or default_chunk_size(kind)
        self.head_rows = min(head_rows(info.vocabulary, kind), self.chunk_size)
        # Hidden states stay on the device, split by sequence parallelism, or are offloaded.
        where = execution.offload_activations
        self.on_disk = where is not None and is_directory(where)
        self.on_host = where == "cpu" and not on_cpu
        self.group_size, self.hidden = group_size, info.hidden_size / group_size
        self.dtype = info.dtype if execution.dtype == "auto" else execution.dtype
        self.size = {"float32": 4, "float64": 8}.get(self.dtype, 2)
        self.weights = info.parameters * self.size
        self.precision = recipe.finetune.precision_on(kind)

    def search(self, name: str, length: int) -> Stage:
        """Return the cost of a search stage at a length, in FLOPs and memory.

        Raises:
            ValueError: a gradient search in float16, whose range is too small for gradients.
        """
        key, section = self.recipe.section(name)
        config = section.config
        searches = section.method == "search"
        forwards = round(window_passes(config, length)) if searches else 0
        stage = self.forwards(name, "search", length, forwards)
        if searches and config.algorithm == "gradient":
            if self.dtype == "float16":
                raise ValueError(
                    f"dtype is float16, whose range is too small for gradients in {name}; use "
                    f"bfloat16 or {key}.algorithm evolution"
                )
            stage = dataclasses.replace(
                stage,
                **self._places(*self._gradient_memory(length)),
                helps=(f"{key}.algorithm=evolution", *stage.helps),
            )
        return stage

    def training(self, name: str, steps: int, length: int) -> Stage:
        """Return the cost of a fine-tuning stage: long sequences, short windows and a teacher."""
        tuning = self.recipe.finetune
        sequences = steps * tuning.batch
        # One forward, a backward of twice its FLOPs, and a second forward under checkpointing.
        passes = 4 if tuning.gradient_checkpointing else 3
        linear, attention = (
            passes * sequences * flops for flops in self.info.forward_flops(length)
        )
        original = self.info.original_max_position_embeddings or 0
        beside = tuning.short_share * length / original  # windows per sequence
        windows = short_windows(steps, beside) * tuning.batch
        taught = tuning.distill and windows > 0
        more = self.info.forward_flops(original)
        times = (passes + taught) * windows  # plus the teacher's forward
        together = length + math.ceil(beside) * original  # in one step
        states, work = self._training_memory(length, together, taught)
        everywhere = work + (self.weights if taught else 0)
        return Stage(
            name,
            "finetune",
            length,
            sequences,
            sequences * length + windows * original,
            linear + times * more[0],
            attention + times * more[1],
            states + everywhere,
            steps,
            replicated=everywhere,
            unshared=self.info.parameters * self._master + everywhere - work,
            helps=tuple(self._training_helps(length, taught)),
        )

    def _training_helps(self, length: int, taught: bool) -> Iterator[str]:
        """Return the settings that lower the memory cost of training, the least harmful first."""
        tuning = self.recipe.finetune
        if not tuning.gradient_checkpointing:
            yield "finetune.gradient_checkpointing=true"
        if tuning.micro_batch > 1:
            yield "finetune.micro_batch=1"
        if tuning.lora is None:
            yield "finetune.lora=64"
        if self.precision != "pure-bf16":
            yield "finetune.precision=pure-bf16"
        if taught:
            yield "finetune.distill=false"
        if length > (self.info.original_max_position_embeddings or length):
            yield f"finetune.sequence_length={length // 2}"

    def choice(self, recovery: Stage) -> Stage:
        """Return the cost of the stage that chooses between short-context rescales."""
        forwards = 6 * self.recipe.recovery.config.windows
        return self.forwards("recovery", "choose", recovery.length, forwards)

    def export(self, length: int) -> Stage:
        """Return the cost of the export stage: the weights in memory."""
        helps = () if self.recipe.execution.offload_weights else ("execution.offload_weights=true",)
        return Stage("export", "export", length, 0, memory=int(self._held()), helps=helps)

    def evaluation(self, lengths: Sequence[int], trained: int | None) -> Stage:
        """Return the cost of the evaluation stage: perplexity and retrieval, without benchmarks.

        Recovery lengths are also measured without recovery and with the unscaled model.
        ``lengths`` ascend from the original length to the target.
        """
        section, original, target = self.recipe.evaluate, lengths[0], lengths[-1]
        others = len(section.methods)
        on_trained = 0 if trained is None else len(section.fine_tuned_methods)
        # Of the result, the unscaled model and YaRN, at most.
        elsewhere = 3 if self.recipe.other_sources else 0
        unasked = self.recipe.recovery.enabled + ("none" not in section.methods)
        forwards, tokens, linear, attention = 0, 0, 0.0, 0.0
        for length in lengths:
            near = length <= (trained or target)
            trials = section.passkey_trials if near else section.passkey_trials_beyond
            methods = others + 1 + (unasked if length <= 2 * original else 0)
            count = (methods + on_trained) * section.documents * (target // length)
            count += elsewhere * (target // length)
            count += trials + others * section.passkey_trials_others + section.needle_trials
            one = self.info.forward_flops(length)
            forwards, tokens = forwards + count, tokens + count * length
            linear, attention = linear + count * one[0], attention + count * one[1]
        stage = self.forwards("evaluate", "evaluate", target, 0)
        return dataclasses.replace(
            stage, forwards=forwards, tokens=tokens, linear=linear, attention=attention
        )

    def forwards(self, name: str, kind: str, length: int, forwards: int) -> Stage:
        """Return the cost of ``forwards`` forward passes over sequences of ``length`` tokens."""
        linear, attention = (forwards * flops for flops in self.info.forward_flops(length))
        hidden = length * self.hidden * self.size
        helps = []
        if not self.on_host and not self.on_disk:
            helps = [_OFFLOAD + ("=DIRECTORY" if self.on_cpu else "=cpu")]
        helps += [] if self.recipe.execution.offload_weights else ["execution.offload_weights=true"]
        helps += ["execution.chunk_size=2048"] if self.chunk_size > 2048 else []
        return Stage(
            name,
            kind,
            length,
            forwards,
            forwards * length,
            linear,
            attention,
            **self._places(self._forward_memory(length), hidden),
            helps=tuple(helps),
        )

    def _places(self, work: float, offloadable: float) -> dict[str, int]:
        """Divide a stage's memory cost over device, host and disk, as the recipe offloads."""
        here = 0 if self.on_host or self.on_disk else offloadable
        host = offloadable if self.on_host else 0
        disk = offloadable if self.on_disk else 0
        return {"memory": int(work + here), "host": int(host), "disk": int(disk)}

    def _forward_memory(self, length: int) -> int:
        """Return the memory cost of a long forward pass: peak bytes without hidden states.

        Weights, then the larger of one layer's work with its keys and values, and the logits.
        """
        info = self.info
        # On a CPU, torch's flash kernel copies keys and values for bf16 matrix units.
        copies = 2 if self.on_cpu and self.size == 2 else 1
        per_token = copies * info.kv_numbers + self._angles
        chunk = min(length, self.chunk_size)
        work = chunk * 12 * info.hidden_size * self.size
        layer = length * per_token * self.size + work
        # Beside logits in float32, those that half precision gave.
        head = _head(info, min(length, self.head_rows)) * (1.25 if self.size == 2 else 1)
        return int(self._held() + length * 24 + max(layer, head))

    @property
    def _angles(self) -> int:
        return 2 * self.info.head_dim  # numbers in the cosines and sines of one token

    def _held(self) -> int:
        """Return the memory cost of the weights: bytes on the device at a time.

        All of them, or with offloading two layers and everything outside the layers. On a CPU,
        weights of a converted dtype are all in memory: only the original files are mapped.
        """
        info = self.info
        mapped = self.dtype == info.dtype and not info.source.endswith(".gguf")
        if not self.recipe.execution.offload_weights or (self.on_cpu and not mapped):
            return self.weights
        outside = (1 if info.tied else 2) * info.vocabulary * info.hidden_size * self.size
        return outside + 2 * (self.weights - outside) // info.layers

    def _gradient_memory(self, length: int) -> tuple[float, float]:
        """Return the memory cost of a long gradient: bytes in use, and bytes to offload.

        In use: weights, angles and their gradients, and the largest of a forward, one chunk's
        graph, and attention's backward pass over some heads. Kept for the backward pass: every
        layer's input, attention output and log-sum-exps; for the current layer also queries, keys,
        values and their gradients.
        """
        info, chunk = self.info, min(length, self.chunk_size)
        groups, rows = info.heads // info.kv_heads, info.head_dim / self.group_size
        forward, chunks = self._forward_memory(length), -(-length // chunk) * self.group_size
        if not self.recipe.execution.offload_weights and is_kept(
            info.layers, info.hidden_size, length, chunks
        ):
            graph = graph_bytes(info.layers, info.hidden_size, length)
            return forward + graph, 2 * length * self.hidden * self.size
        graph = graph_bytes(1, info.hidden_size, chunk)
        here = self.group_size == 1 and (self.on_cpu or not (self.on_host or self.on_disk))
        share = -(-info.kv_heads // self.group_size) * groups
        some_heads = backward_bytes(share, info.head_dim, length, self.chunk_size, self.size, here)
        work = self._held() + length * (24 + 2 * self._angles * self.size) + max(graph, some_heads)
        each = (self.hidden + info.heads * rows) * self.size + 4 * info.heads / self.group_size
        once = (self.hidden + 2 * (info.heads + info.kv_heads) * rows) * self.size
        return max(forward, work), length * (info.layers * each + once)

    @property
    def _master(self) -> int:
        """Memory cost of one weight during training, in bytes."""
        return 2 if self.precision == "pure-bf16" else 4

    def _training_memory(self, length: int, tokens: int, taught: bool) -> tuple[int, int]:
        """Return the memory cost of a training step: bytes that FSDP shards, and bytes of work.

        Weights, gradients and Adam's two moments; and the activations kept for the backward pass:
        with gradient checkpointing one hidden state per layer and token, and one whole layer.
        ``tokens`` counts a sequence and its short windows. A ``taught`` step also holds the
        teacher's probabilities. Attention without a fused kernel takes 28 bytes for each score of a
        block (measured).
        """
        info, tuning = self.info, self.recipe.finetune
        half = 4 if self.precision == "float32" else 2
        states = info.parameters * self._master * 4
        if tuning.lora is not None:
            states = info.parameters * self._master + info.vocabulary * info.hidden_size * 32
        kept = info.layers * info.hidden_size
        layer = 24 * info.hidden_size
        if not tuning.gradient_checkpointing:
            kept, layer = info.layers * 24 * info.hidden_size, 0
        head = _head(info, ROWS) * (2.5 if taught else 1)
        work = tokens * (kept + layer) * half
        original = info.original_max_position_embeddings or length
        short = (tokens - length) // original  # windows, in one batch
        work += info.heads * 28 * max(self._scores(length), short * self._scores(original))
        return int(states), int(tuning.micro_batch * work + head)

    def _scores(self, length: int) -> int:
        """Return the scores per head that cost memory where training has no fused kernel."""
        info = self.info
        window = None if info.explicit_scores else info.sliding_window
        if not info.explicit_scores and (window is None or window >= length):
            return 0
        return min(length, query_block_size(window)) * min(length, KEYS)


def _head(info: ModelInfo, rows: int) -> int:
    """Return the memory cost of ``rows`` float32 logits and their softmax or gradient."""
    return 2 * rows * info.vocabulary * 4
