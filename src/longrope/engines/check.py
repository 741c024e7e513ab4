"""Check an inference engine: find out which factors it applies.

The engine returns log-probabilities of the likeliest next tokens for prompts on both sides of the
boundary. longrope computes the same tokens with the short, the long and no factors. The nearest of
the three is what the engine applied.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from longrope.checkpoints.gguf import read_pair
from longrope.checkpoints.importer import find_pair, import_pair
from longrope.checkpoints.manifest import FILE as MANIFEST
from longrope.checkpoints.manifest import Manifest
from longrope.data.encoding import bos_tokens, encode
from longrope.data.stdlib import library_texts
from longrope.data.windows import with_bos
from longrope.engines.specs import ENGINES, Engine, query, require_engine
from longrope.execution import ExecutionConfig
from longrope.files.parse import read_json
from longrope.inference.load import inspect_weights, load_extended
from longrope.models.load import LoadedModel, load_model
from longrope.progress import progress
from longrope.rope.apply import check_fits, rescaled
from longrope.rope.pair import RescalePair
from longrope.rope.rescale import Rescale

_TOP = 20  # vLLM's default limit of log-probabilities
_CLEAR = 2.0  # minimum ratio of the second nearest distance to the nearest
_NEAR = 0.25  # mean distance in nats; rounding stays below it, even of 4-bit weights
_PAD = 256  # llama.cpp rounds a context up to a multiple of it, in tokens


@dataclasses.dataclass(frozen=True)
class LengthResult:
    """Result of an engine check at one prompt length.

    Args:
        length: tokens of the prompt.
        context: maximum context that the engine was started with, if it decides the factors; else
            None.
        applied: "short", "long", "none", or "unclear" if two are about as near or none is near.
        intended: "short" or "long".
        largest: largest difference of a log-probability under the intended factors, in nats.
        distances: mean difference of log-probabilities under each of the three, in nats.
    """

    length: int
    context: int | None
    applied: str
    intended: str
    largest: float
    distances: dict[str, float]

    @property
    def right(self) -> bool:
        """Whether the checked engine applied the intended factors at this length."""
        return self.applied == self.intended


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Results of the check of one engine, and its version."""

    engine: str
    version: str
    lines: list[LengthResult]

    @property
    def right(self) -> bool:
        """Whether the checked engine applied the intended factors at every length."""
        return all(line.right for line in self.lines)


def verify(
    reference: "Reference",
    engine: str,
    *,
    engine_python: str | None = None,
    lengths: tuple[int, ...] = (),
    prompts: int = 2,
) -> Verdict:
    """Check an engine: compare its log-probabilities with longrope's.

    Args:
        reference: longrope's model of the export; several engines can share it.
        engine: a key of :data:`~longrope.engines.specs.ENGINES`.
        engine_python: Python of the engine's environment; by default this one.
        lengths: prompt lengths in tokens; by default below, at and just above the boundary
            between short and long factors, and four times the boundary.
        prompts: prompts per length.

    Raises:
        ValueError: an unknown engine, one that is not installed or failed, or one that cannot
            read this export.
    """
    spec, where = require_engine(reference.path, engine, engine_python)
    pair = reference.pair
    points = lengths or _points(reference.boundary, pair.long.max_position_embeddings, spec)
    asked = [_make_prompts(reference.loaded, length, prompts) for length in points]
    letter = int(encode(reference.loaded.tokenizer, ["a"])[0][-1])
    contexts = [_context(spec, pair, length, max(points)) for length in points]
    answers: dict[int, list[dict[str, float]]] = {}
    version, lines = "", []
    groups = list(dict.fromkeys(contexts))
    with progress("verify", len(groups) + len(points)) as advance:
        for number, context in enumerate(groups):
            advance(number, f"asking {engine} with a context of {context:,} tokens")
            these = [i for i, c in enumerate(contexts) if c == context]
            question = {
                "path": str(Path(reference.path).resolve()),
                "context": context,
                "top": _TOP,
                "letter": letter,
                "dtype": reference.dtype,
                "prompts": [ids for i in these for ids in asked[i]],
            }
            answer = query(spec, where, question)
            version = answer["version"]
            rows = iter(answer["answers"])
            answers |= {i: [next(rows) for _ in asked[i]] for i in these}
        if engine == "transformers-legacy" and not version.startswith("transformers 4"):
            raise ValueError(
                f"engine_python={where!r} has {version}, but engine={engine!r} requires "
                "transformers 4"
            )
        for i, length in enumerate(points):
            advance(len(groups) + i, f"computing the same tokens at {length:,}")
            decided = contexts[i] if spec.by_context else None
            lines.append(reference.line(length, decided, asked[i], answers[i]))
        advance(len(groups) + len(points), "")
    return Verdict(engine, version, lines)


class Reference:
    """Reference to check engines against: log-probabilities with short, long and no factors.

    Args:
        path: a directory or a GGUF file with scaled RoPE.
        execution: how longrope computes the reference, by default in float32. Engines
            use its dtype too, except llama.cpp.
        source: the model or run that was exported. Its weights then give the reference, so that
            weights which the export lost or changed show; by default the export's own do.

    Raises:
        ValueError: no such model, a RoPE that is not scaled, or factors that are not those which
            the export recorded in its manifest.
    """

    def __init__(
        self, path: str, execution: ExecutionConfig | None = None, source: str | None = None
    ):
        execution = execution or ExecutionConfig(dtype="float32")
        if execution.dtype == "auto":
            raise ValueError("dtype is auto; name the dtype of both sides, such as float32")
        if source is None:
            loaded, pair = load_extended(path, execution)
        else:
            loaded, pair = _with_factors_of(path, source, execution)
        if pair is None:
            raise ValueError(f"{path}: its RoPE is not scaled; give an exported model to verify")
        _require_recorded(path, find_pair(path, execution.trust_remote_code) or pair)
        self.path, self.dtype, self.pair, self.loaded = path, execution.dtype, pair, loaded
        # A static export records its boundary only in its manifest.
        boundary, target = import_pair(path).recovery_length, pair.long.max_position_embeddings
        self.boundary = boundary if boundary < target else target // 4
        self.forward = loaded.forward()
        self.computed: dict[tuple[Rescale, tuple[int, ...]], torch.Tensor] = {}
        none = pair.long.replace(factors=(1.0,) * len(pair.long.factors), attention_factor=1.0)
        self.candidates: dict[str, Rescale] = {"long": pair.long, "none": none}
        if (pair.short.factors, pair.short.attention_factor) != (
            pair.long.factors,
            pair.long.attention_factor,
        ):
            self.candidates["short"] = pair.short

    def line(
        self,
        length: int,
        context: int | None,
        prompts: list[list[int]],
        answers: list[dict[str, float]],
    ) -> LengthResult:
        """Check the engine's answers to prompts of one length, and return the result.

        Args:
            prompts: token ids of each prompt.
            answers: for each prompt, log-probabilities in nats by token id.
        """
        intended = "short" if self.pair.choose(length) is self.pair.short else "long"
        if intended not in self.candidates:
            intended = "long"
        differences = {
            name: torch.cat(
                [self._differences(rescale, *one) for one in zip(prompts, answers, strict=True)]
            )
            for name, rescale in self.candidates.items()
        }
        distances = {name: float(d.mean()) for name, d in differences.items()}
        nearest, second = sorted(distances, key=lambda name: distances[name])[:2]
        clear = distances[nearest] * _CLEAR < distances[second] and distances[nearest] < _NEAR
        applied = nearest if clear else "unclear"
        largest = float(differences[intended].max())
        return LengthResult(length, context, applied, intended, largest, distances)

    def _differences(
        self, rescale: Rescale, ids: list[int], answer: dict[str, float]
    ) -> torch.Tensor:
        ours = self._log_probabilities(rescale, tuple(ids))
        tokens = torch.tensor([int(token) for token in answer])
        theirs = torch.tensor(list(answer.values()), dtype=torch.double)
        return (ours[tokens] - theirs).abs()

    def _log_probabilities(self, rescale: Rescale, ids: tuple[int, ...]) -> torch.Tensor:
        if (rescale, ids) not in self.computed:
            with rescaled(self.loaded.model, rescale):
                logits = self.forward.prefill(torch.tensor([ids]))[0][0]
            self.computed[rescale, ids] = logits.double().log_softmax(-1).cpu()
        return self.computed[rescale, ids]


def _require_recorded(path: str, pair: RescalePair) -> None:
    """Refuse to check an engine against an export whose factors were changed since.

    Raises:
        ValueError: ``pair`` is not what the manifest says, or the config says it in two ways.
    """
    export = Path(path)
    if export.suffix == ".gguf":
        manifest, where = read_pair(export)[1], path
    else:
        manifest = Manifest.load(export) if export.is_dir() else None
        where = f"{export / 'config.json'} or {export / MANIFEST}"
    if manifest is None:
        return
    if not manifest.describes(pair) or not _consistent(export / "config.json"):
        raise ValueError(
            f"{where} was changed after the export: its factors, lengths or attention factor are "
            "not those that the export recorded; export again"
        )


def _consistent(config: Path) -> bool:
    """Return whether both places for scaling in an export's config say the same to engines."""
    if not config.exists():
        return True
    content = read_json(config)
    new, old = content.get("rope_parameters") or {}, content.get("rope_scaling") or {}
    return all(new[key] == old[key] for key in new.keys() & old.keys())


def _with_factors_of(
    path: str, source: str, execution: ExecutionConfig
) -> tuple[LoadedModel, RescalePair | None]:
    """Load the model that was exported, and return it with the export's factors for it."""
    trusted = execution.trust_remote_code
    written = find_pair(path, trusted)
    if written is None:
        return load_extended(path, execution)
    exact = import_pair(path, trust_remote_code=trusted)  # before an attention factor was folded
    pair = RescalePair(
        written.short.replace(attention_factor=exact.short.attention_factor),
        written.long.replace(attention_factor=exact.long.attention_factor),
    )
    info = inspect_weights(
        source,
        rope_scaling="replace",
        original_length=exact.long.original_max_position_embeddings,
        trust_remote_code=trusted,
    )
    info.require_extendable()
    assert info.rotary_dim and info.rope_theta
    check_fits(pair.long, info.rotary_dim // 2, info.rope_theta)
    return load_model(info.source, execution, info=info), pair


def _points(boundary: int, target: int, spec: Engine) -> tuple[int, ...]:
    """Return prompt lengths to check an engine at, on both sides of the boundary."""
    # An engine that decides by its maximum context holds one token less in a prompt.
    at = boundary - 1 if spec.by_context else boundary
    deep = min(4 * boundary, target - 1)
    return tuple(sorted({boundary * 3 // 4, at, boundary + 1, deep}))


def _context(spec: Engine, pair: RescalePair, length: int, longest: int) -> int:
    """Return the maximum context to check an engine with; short if it decides the factors."""
    if spec.by_context and length < pair.recovery_length:
        return min(pair.recovery_length, -(-(longest + 1) // _PAD) * _PAD)
    allocate = -(-(longest + 1) // _PAD) * _PAD
    return min(max(allocate, length + 1), pair.long.max_position_embeddings)


def _make_prompts(loaded: LoadedModel, length: int, number: int) -> list[list[int]]:
    """Return prompts to check an engine with: Python's standard library, with BOS.

    Each has ``length`` tokens.
    """
    ids, bos = np.zeros(0, dtype=np.int32), bos_tokens(loaded.tokenizer)
    each = length - len(bos)
    for text in library_texts(held_out=True).values():
        ids = np.concatenate([ids, *encode(loaded.tokenizer, [text])])
        if len(ids) >= number * each:
            parts = [ids[i * each : (i + 1) * each] for i in range(number)]
            return [with_bos(part, bos).tolist() for part in parts]
    raise ValueError(
        f"lengths is {length:,}; {number} prompts need {number * each:,} tokens, but the text "
        f"(Python's standard library) has {len(ids):,}: use shorter prompts"
    )


def advice(verdict: Verdict) -> Iterator[str]:
    """Yield a remedy for every length at which the check of an engine failed."""
    wrong = [line for line in verdict.lines if not line.right]
    for line in wrong:
        remedy = ENGINES[verdict.engine].instead
        if line.applied == "unclear":
            remedy = (
                "no factors match; the rounding of quantized weights may exceed their differences"
            )
        yield (
            f"at {line.length:,} tokens {verdict.engine} applied {line.applied}, not "
            f"{line.intended}: {remedy}"
        )
