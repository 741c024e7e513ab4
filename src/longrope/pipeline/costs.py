"""The stages of an extension, each with what it costs: FLOPs, tokens, bytes."""

import dataclasses
import math
from collections.abc import Sequence

from longrope.attention.backward import KEYS
from longrope.attention.chunked import at_once
from longrope.layerwise.backward import graph_bytes, is_kept
from longrope.layerwise.forward import default_chunk, head_rows
from longrope.layerwise.split_attention import backward_bytes
from longrope.layerwise.storage import is_directory
from longrope.models.info import ModelInfo
from longrope.pipeline.recipe import Recipe
from longrope.train.dataset import short_windows
from longrope.train.loss import ROWS


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: its directory's name, what it does, and its cost.

    ``tokens`` go through the model in all, in windows of ``length``; ``linear`` and
    ``attention`` are FLOPs; ``memory`` bytes at the peak, of which ``replicated`` are on every
    device whatever is shared out over them, and ``unshared`` before anything is. ``host`` are
    bytes that wait in the host's memory for a GPU, ``disk`` in files of a folder; ``helps`` what
    the recipe might have to need less.
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
    """FLOPs and bytes of a model's forwards and training steps."""

    def __init__(self, info: ModelInfo, recipe: Recipe, on_cpu: bool, team: int = 1):
        self.info, self.recipe, self.on_cpu = info, recipe, on_cpu
        kind = "cpu" if on_cpu else "cuda"
        self.chunk = recipe.chunk or default_chunk(kind)
        self.head_rows = min(head_rows(info.vocabulary, kind), self.chunk)
        # Hidden states wait on the device, its share of them where a team has the sequence; or not.
        where = recipe.offload_activations
        self.on_disk = where is not None and is_directory(where)
        self.on_host = where == "cpu" and not on_cpu
        self.team, self.hidden = team, info.hidden_size / team
        self.dtype = info.dtype if recipe.dtype == "auto" else recipe.dtype
        self.size = {"float32": 4, "float64": 8}.get(self.dtype, 2)
        self.weights = info.parameters * self.size

    def search(self, name: str, length: int) -> Stage:
        """Return the search stage at a length, as configured in the recipe.

        Raises:
            ValueError: a gradient search in float16, in which gradients underflow.
        """
        key, section = self.recipe.section(name)
        config = section.config
        each = config.windows + config.passkey_prompts
        searches = section.method == "search"
        forwards = config.forwards * each if searches else 0
        stage = self.forwards(name, "search", length, forwards)
        if searches and config.algorithm == "gradient":
            if self.dtype == "float16":
                raise ValueError(
                    f"dtype is float16, too small for the gradients of {name}; use bfloat16, or "
                    f"{key}.algorithm evolution"
                )
            stage = dataclasses.replace(
                stage,
                **self._places(*self._slope_memory(length)),
                helps=(f"{key}.algorithm evolution", *stage.helps),
            )
        return stage

    def training(self, name: str, steps: int, length: int) -> Stage:
        """Steps of a batch of pieces of a length, their short windows, and a teacher's forwards."""
        tuning = self.recipe.finetune
        pieces = steps * tuning.batch
        # Forward and twice that backward; with checkpointing the forward once again.
        passes = 4 if tuning.gradient_checkpointing else 3
        linear, attention = (passes * pieces * flops for flops in self.info.forward_flops(length))
        original = self.info.original_max_position_embeddings or 0
        beside = tuning.short_share * length / original  # windows, of a piece
        windows = short_windows(steps, beside) * tuning.batch
        taught = tuning.distill and windows > 0
        more = self.info.forward_flops(original)
        times = (passes + taught) * windows  # the teacher's forward
        together = length + math.ceil(beside) * original  # in one step
        teacher = self.weights if taught else 0
        return Stage(
            name,
            "finetune",
            length,
            pieces,
            pieces * length + windows * original,
            linear + times * more[0],
            attention + times * more[1],
            self._training_memory(length, together, taught) + teacher,
            steps,
            replicated=teacher,
            unshared=self.info.parameters * self._master + teacher,
        )

    def choice(self, recovery: Stage) -> Stage:
        """Both short sets and the long one at both lengths."""
        forwards = 6 * self.recipe.recovery.config.windows
        return self.forwards("recovery", "choose", recovery.length, forwards)

    def evaluation(self, lengths: Sequence[int], trained: int) -> Stage:
        """Perplexity at every length for every method, and retrieval; benchmarks are not priced.

        At the lengths of recovery also without it, and of the unscaled model. ``lengths`` go from
        the original one to the target.
        """
        section, original, target = self.recipe.evaluate, lengths[0], lengths[-1]
        others = len(section.methods)
        unasked = self.recipe.recovery.enabled + ("none" not in section.methods)
        forwards, tokens, linear, attention = 0, 0, 0.0, 0.0
        for length in lengths:
            trials = section.passkey_trials if length <= trained else section.passkey_trials_beyond
            methods = others + 1 + (unasked if length <= 2 * original else 0)
            count = methods * section.documents * (target // length)
            count += trials + others * section.passkey_trials_others + section.needle_trials
            one = self.info.forward_flops(length)
            forwards, tokens = forwards + count, tokens + count * length
            linear, attention = linear + count * one[0], attention + count * one[1]
        stage = self.forwards("evaluate", "evaluate", target, 0)
        return dataclasses.replace(
            stage, forwards=forwards, tokens=tokens, linear=linear, attention=attention
        )

    def forwards(self, name: str, kind: str, length: int, forwards: int) -> Stage:
        """So many forwards of a length."""
        linear, attention = (forwards * flops for flops in self.info.forward_flops(length))
        hidden = length * self.hidden * self.size
        helps = []
        if not self.on_host and not self.on_disk:
            helps = ["offload_activations FOLDER" if self.on_cpu else "offload_activations cpu"]
        helps += [] if self.recipe.offload else ["offload weights"]
        helps += ["chunk 2048"] if self.chunk > 2048 else []
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

    def _places(self, work: float, waits: float) -> dict[str, int]:
        """Where bytes are that are worked with, and those that wait as hidden states do."""
        here = 0 if self.on_host or self.on_disk else waits
        host, disk = waits if self.on_host else 0, waits if self.on_disk else 0
        return {"memory": int(work + here), "host": int(host), "disk": int(disk)}

    def _forward_memory(self, length: int) -> int:
        """The long forward but hidden states: weights; per token one layer's KV and angles, or
        logits, which come when those are gone.
        """
        info = self.info
        # torch's flash kernel on a CPU repacks keys and values for the matrix units of bf16.
        copies = 2 if self.on_cpu and self.size == 2 else 1
        per_token = copies * info.kv_numbers + self._angles
        chunk = min(length, self.chunk)
        work = chunk * 12 * info.hidden_size * self.size
        layer = length * per_token * self.size + work
        # Beside logits in float32, those that half precision gave.
        head = _head(info, min(length, self.head_rows)) * (1.25 if self.size == 2 else 1)
        return int(self._held() + length * 24 + max(layer, head))

    @property
    def _angles(self) -> int:
        """Cosines and sines of a token."""
        return 2 * self.info.head_dim

    def _held(self) -> int:
        """Weights that are on the device at a time: all, or what is no layer and two layers.

        On a CPU converted ones are all in its memory: only the files themselves are mapped.
        """
        info = self.info
        mapped = self.dtype == info.dtype and not info.source.endswith(".gguf")
        if self.recipe.offload is None or (self.on_cpu and not mapped):
            return self.weights
        outside = (1 if info.tied else 2) * info.vocabulary * info.hidden_size * self.size
        return outside + 2 * (self.weights - outside) // info.layers

    def _slope_memory(self, length: int) -> tuple[float, float]:
        """The long gradient's: to work with, and what waits meanwhile.

        At work, beside weights and angles with their slopes: a forward, or a chunk's graph, or some
        heads of attention. Of every layer its input and attention's output wait, with the
        log-sum-exps of this; of the layer at work queries, keys, values and their slopes.
        """
        info, chunk = self.info, min(length, self.chunk)
        groups, rows = info.heads // info.kv_heads, info.head_dim / self.team
        forward, chunks = self._forward_memory(length), -(-length // chunk) * self.team
        if not self.recipe.offload and is_kept(info.layers, info.hidden_size, length, chunks):
            graph = graph_bytes(info.layers, info.hidden_size, length)
            return forward + graph, 2 * length * self.hidden * self.size
        graph = graph_bytes(1, info.hidden_size, chunk)
        here = self.team == 1 and (self.on_cpu or not (self.on_host or self.on_disk))
        share = -(-info.kv_heads // self.team) * groups
        some_heads = backward_bytes(share, info.head_dim, length, self.chunk, self.size, here)
        work = self._held() + length * (24 + 2 * self._angles * self.size) + max(graph, some_heads)
        each = (self.hidden + info.heads * rows) * self.size + 4 * info.heads / self.team
        once = (self.hidden + 2 * (info.heads + info.kv_heads) * rows) * self.size
        return max(forward, work), length * (info.layers * each + once)

    @property
    def _master(self) -> int:
        """Bytes of a weight while it is trained."""
        return 2 if self.recipe.finetune.precision == "pure-bf16" else 4

    def _training_memory(self, length: int, tokens: int, taught: bool) -> int:
        """Weights, gradients and Adam's two moments, and what the backward pass keeps.

        With checkpointing a hidden state per layer and token, and one layer whole; ``tokens`` are
        a piece's and its short windows'. What is ``taught`` is probabilities beside logits. Where
        no kernel does it, 28 bytes a score of a block, measured: it, its weight, and going back.
        """
        info, tuning = self.info, self.recipe.finetune
        half = 4 if tuning.precision == "float32" else 2
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
        return int(states + tuning.micro_batch * work + head)

    def _scores(self, length: int) -> int:
        """Of a head, made together where training has no kernel for them."""
        info = self.info
        window = None if info.explicit_scores else info.sliding_window
        if not info.explicit_scores and (window is None or window >= length):
            return 0
        return min(length, at_once(window)) * min(length, KEYS)


def _head(info: ModelInfo, rows: int) -> int:
    """Logits in float32, and as many more: their softmax, or their gradient."""
    return 2 * rows * info.vocabulary * 4
