"""Which factors an engine applied: its log-probabilities against our own forward's.

The engine says the likeliest next tokens of a few prompts on both sides of the boundary; we compute
the same tokens with the short, the long and no factors, and see which of the three it is.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from longrope.checkpoints.importer import import_pair
from longrope.data.stdlib import library_texts
from longrope.engines.specs import ENGINES, Engine, ask, require_engine
from longrope.inference.load import load_extended
from longrope.models.load import LoadedModel
from longrope.rope.apply import rescaled
from longrope.rope.pair import RescalePair
from longrope.rope.rescale import Rescale

_TOP = 20  # vLLM's default limit
_CLEAR = 2.0  # the next candidate is at least so many times as far
_NEAR = 0.25  # nats on average: more is no rounding, not even of 4-bit weights
_PAD = 256  # llama.cpp rounds a context up to a multiple of it


@dataclasses.dataclass(frozen=True)
class Line:
    """What an engine did at one length.

    Args:
        context: what the engine was started with, where that decides.
        applied: "short", "long", "none", or "unclear" where two are about as near, or none is.
        largest: difference of a log-probability from the intended factors', in nats.
        distances: mean difference from each of the three.
    """

    length: int
    context: int | None
    applied: str
    intended: str
    largest: float
    distances: dict[str, float]

    @property
    def right(self) -> bool:
        return self.applied == self.intended


@dataclasses.dataclass(frozen=True)
class Verdict:
    """All lines of one engine, and which version it was."""

    engine: str
    version: str
    lines: list[Line]

    @property
    def right(self) -> bool:
        return all(line.right for line in self.lines)


def verify(
    reference: "Reference",
    engine: str,
    *,
    python: str | None = None,
    lengths: tuple[int, ...] = (),
    prompts: int = 2,
) -> Verdict:
    """Ask an engine, and compare.

    Args:
        reference: what it is held to; of several engines the same one may be given.
        python: of the engine's environment; by default this one's.
        lengths: prompt lengths in tokens; by default below, at and just above the boundary
            between short and long, and four times it.

    Raises:
        ValueError: no such engine, it is not installed, it failed, or it cannot read this export.
    """
    how, where = require_engine(reference.path, engine, python)
    pair = reference.pair
    points = lengths or _points(reference.boundary, pair.long.max_position_embeddings, how)
    asked = [_prompts(reference.loaded, length, prompts) for length in points]
    letter = reference.loaded.tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    contexts = [_context(how, pair, length, max(points)) for length in points]
    answers: dict[int, list[dict[str, float]]] = {}
    version = ""
    for context in dict.fromkeys(contexts):
        these = [i for i, c in enumerate(contexts) if c == context]
        question = {
            "path": str(Path(reference.path).resolve()),
            "context": context,
            "top": _TOP,
            "letter": letter,
            "dtype": reference.dtype,
            "prompts": [ids for i in these for ids in asked[i]],
        }
        answer = ask(how, where, question)
        version = answer["version"]
        rows = iter(answer["answers"])
        answers |= {i: [next(rows) for _ in asked[i]] for i in these}
    if engine == "transformers-legacy" and not version.startswith("transformers 4"):
        raise ValueError(f"--python {where}: has {version}; transformers-legacy wants a 4.x")
    lines = [
        reference.line(length, contexts[i] if how.by_context else None, asked[i], answers[i])
        for i, length in enumerate(points)
    ]
    return Verdict(engine, version, lines)


class Reference:
    """Our own forward of an export, under each of the three sets; what it ``computed``, it keeps.

    Args:
        path: a directory or a GGUF file with scaled RoPE.
        dtype: what both sides compute in, where the engine can be told (llama.cpp cannot).

    Raises:
        ValueError: not scaled, or no such model.
    """

    def __init__(self, path: str, *, dtype: str = "float32", chunk: int | None = None):
        loaded, pair = load_extended(path, dtype=dtype)
        if pair is None:
            raise ValueError(f"{path}: its RoPE is not scaled; there is nothing to verify")
        self.path, self.dtype, self.pair, self.loaded = path, dtype, pair, loaded
        # A static export has a boundary only in its note.
        boundary, target = import_pair(path).recovery_length, pair.long.max_position_embeddings
        self.boundary = boundary if boundary < target else target // 4
        self.forward = loaded.forward(chunk)
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
    ) -> Line:
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
        return Line(length, context, applied, intended, largest, distances)

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


def _points(boundary: int, target: int, how: Engine) -> tuple[int, ...]:
    """Below, at, just above and far above: a prompt by context has room for one token more."""
    at = boundary - 1 if how.by_context else boundary
    deep = min(4 * boundary, target - 1)
    return tuple(sorted({boundary * 3 // 4, at, boundary + 1, deep}))


def _context(how: Engine, pair: RescalePair, length: int, longest: int) -> int:
    """What to start the engine with: a short context for short texts where it decides by that."""
    if how.by_context and length < pair.recovery_length:
        return min(pair.recovery_length, -(-(longest + 1) // _PAD) * _PAD)
    allocate = -(-(longest + 1) // _PAD) * _PAD
    return min(max(allocate, length + 1), pair.long.max_position_embeddings)


def _prompts(loaded: LoadedModel, length: int, number: int) -> list[list[int]]:
    """Texts that every machine has, cut to so many tokens."""
    ids: list[int] = []
    for text in library_texts(held_out=True).values():
        ids += loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= number * length:
            return [ids[i * length : (i + 1) * length] for i in range(number)]
    raise ValueError(f"--lengths {length}: the Python library has only {len(ids):,} tokens")


def advice(verdict: Verdict) -> Iterator[str]:
    """What to do about the lines that are not as intended."""
    wrong = [line for line in verdict.lines if not line.right]
    for line in wrong:
        what = ENGINES[verdict.engine].instead
        if line.applied == "unclear":
            what = "no set explains it; quantised weights may round more than factors change"
        yield (
            f"at {line.length:,} tokens {verdict.engine} applied {line.applied}, not "
            f"{line.intended}: {what}"
        )
