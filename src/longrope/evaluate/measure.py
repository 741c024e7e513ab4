"""Measurements of perplexity, retrieval and benchmarks: one path for every verb.

``extend``, ``compare`` and ``evaluate`` are lists of :class:`Measurement`. Each runs through
:func:`measure`, and resumes from the parts that a :class:`MeasurementCache` holds.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from longrope.data.encoding import bos_tokens
from longrope.data.prompts import Prompt, haystack_lines, needle_prompt, passkey_prompt
from longrope.data.windows import TokenDocument, check_documents, warn_of_short
from longrope.evaluate.benchmarks import score_benchmark
from longrope.evaluate.cache import MeasurementCache
from longrope.evaluate.perplexity import score
from longrope.evaluate.retrieval import retrieve
from longrope.evaluate.settings import BenchmarkConfig, PerplexityConfig, RetrievalConfig
from longrope.models.load import LoadedModel
from longrope.progress import progress
from longrope.rope.apply import rescaled
from longrope.rope.rescale import Rescale
from longrope.version import __version__


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One measurement, of any kind, of one model under one choice of factors.

    Args:
        kind: "perplexity", "passkey", "needle" or "benchmark".
        model: identity of the weights and of everything else that the outputs depend on.
        choose: returns the rescale for a sequence of so many tokens.
        length: tokens of each window or prompt; of a benchmark, the longest prompt.
        options: options of this kind; a benchmark's name one task.
        documents: text to score or to hide the needle in; empty for other kinds.
    """

    kind: str
    model: str
    choose: Callable[[int], Rescale]
    length: int
    options: PerplexityConfig | RetrievalConfig | BenchmarkConfig
    documents: Sequence[TokenDocument] = ()

    @property
    def key(self) -> str:
        """Content hash of everything that decides a measurement's result; also a file name."""
        # The prompts of a benchmark have many lengths: its factors are known by both ends.
        lengths = (1, self.length) if self.kind == "benchmark" else (self.length,)
        rescales = [self.choose(length) for length in lengths]
        content = {
            "model": self.model,
            "rescales": [rescale.applied() for rescale in rescales],
            "options": self.options.model_dump(mode="json"),
            "documents": [digest for document in self.documents for digest in document.sha256],
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return f"{self.kind}-{self.length}-{digest[:16]}"


def model_identity(loaded: LoadedModel) -> str:
    """Return the model's part of a measurement's key: its fingerprint and longrope's version."""
    return f"{loaded.fingerprint()} {__version__}"


def measure(
    loaded: LoadedModel,
    measurement: Measurement,
    cache: MeasurementCache,
) -> Any:
    """Run one measurement of any kind, and skip the parts that the cache already holds.

    Returns:
        For perplexity :class:`~longrope.evaluate.perplexity.Scores`, for retrieval a list of
        :class:`~longrope.evaluate.retrieval.Row`, for a benchmark the scores of each table row
        by question.

    Raises:
        ValueError: documents or a haystack that are too short, a length that does not hold the
            question, or benchmark data that cannot be read.
    """
    options, choose, length = measurement.options, measurement.choose, measurement.length
    if isinstance(options, BenchmarkConfig):
        (task,) = options.tasks
        return score_benchmark(
            loaded,
            choose,
            length,
            task,
            options,
            cache.answers(measurement.key),
        )
    forward = loaded.forward()
    if isinstance(options, PerplexityConfig):
        with rescaled(loaded.model, choose(length)):
            return score(
                forward,
                measurement.documents,
                length,
                bos=bos_tokens(loaded.tokenizer),
                lengths=options.lengths,
                stride=options.stride,
                tokens_per_document=options.tokens_per_document,
                known=cache.losses(measurement.key),
            )
    return retrieve(
        forward,
        _prompt_maker(loaded.tokenizer, measurement, options.digits),
        length,
        choose(length),
        trials=options.trials,
        seed=options.seed,
        answered=cache.answers(measurement.key),
    )


def measure_all(
    loaded: LoadedModel,
    measurements: Sequence[Measurement],
    cache: MeasurementCache,
) -> list[Any]:
    """Run several measurements of one model in order, with a progress bar."""
    for one in measurements:
        check_documents(one.documents, loaded.info.vocabulary)
    found, show = [], loaded.group.rank == 0
    for one in measurements[:1] if show else ():
        if isinstance(one.options, PerplexityConfig):  # the others are on the same documents
            warn_of_short(one.documents, max(one.options.lengths))
    with progress("evaluate", len(measurements), show=show) as advance:
        for number, one in enumerate(measurements, 1):
            found.append(measure(loaded, one, cache))
            advance(number, f"{one.kind} at {one.length:,}: {_summary(one.kind, found[-1])}")
    return found


def _prompt_maker(
    tokenizer: Any, measurement: Measurement, digits: int
) -> Callable[[int, float, Any], Prompt]:
    if measurement.kind == "passkey":
        return lambda length, depth, rng: passkey_prompt(tokenizer, length, depth, rng, digits)
    lines = haystack_lines(measurement.documents, tokenizer, measurement.length)
    return lambda length, depth, rng: needle_prompt(tokenizer, lines, length, depth, rng, digits)


def _summary(kind: str, found: Any) -> str:
    if kind == "perplexity":
        return f"{found.perplexity:.2f}"
    if kind == "benchmark":
        return f"{sum(map(len, found.values())):,} questions"
    return f"{sum(row.correct for row in found)} of {sum(row.trials for row in found)} correct"
