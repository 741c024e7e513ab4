"""Retrieval from the command line: lengths × depths, under a rescale or an extended pair."""

import dataclasses
from collections.abc import Callable
from typing import Any

from longrope.data.documents import check_sources
from longrope.data.prompts import Prompt, haystack_lines, needle_prompt, passkey_prompt
from longrope.data.windows import load_documents
from longrope.evaluate.cache import MeasurementCache
from longrope.evaluate.retrieval import Row, retrieve
from longrope.models.info import ModelInfo
from longrope.models.load import LoadedModel
from longrope.progress import progress
from longrope.rope.rescale import Rescale
from longrope.units import parse_length


@dataclasses.dataclass(frozen=True)
class AskOptions:
    """What ``longrope evaluate --passkey`` and ``--needle`` may be told.

    Raises:
        ValueError: a count below 1.
    """

    kind: str
    lengths: tuple[str, ...]
    trials: int = 20
    digits: int = 5
    seed: int = 0
    data: tuple[str, ...] = ()
    field: str = "text"
    chunk: int | None = None
    offload_activations: str | None = None

    def __post_init__(self) -> None:
        for name in ("trials", "digits", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 1")

    def check(self, info: ModelInfo) -> None:
        """Refuse lengths and data that cannot be, before any weight is read."""
        self.resolve(info)
        check_sources(self.data)

    def resolve(self, info: ModelInfo) -> list[int]:
        """The lengths in tokens, ascending."""
        original = info.original_max_position_embeddings
        return sorted({parse_length(text, original) for text in self.lengths})


def ask(
    loaded: LoadedModel,
    options: AskOptions,
    choose: Callable[[int], Rescale | None],
    unfinished: MeasurementCache,
) -> list[Row]:
    """Ask every question; ``choose`` gives the rescale for a length, what is unfinished goes on.

    Raises:
        ValueError: a length that holds not even the question, or a haystack that is too short.
    """
    lengths = options.resolve(loaded.info)
    tokenizer = loaded.tokenizer
    lines, hashes = [], []
    if options.kind == "needle":
        documents = load_documents(
            loaded.tokenizer, options.data, field=options.field, held_out=True
        )
        lines = haystack_lines(documents, tokenizer)
        hashes = [digest for document in documents for digest in document.sha256]

    def make(length: int, depth: float, rng: Any) -> Prompt:
        if options.kind == "needle":
            return needle_prompt(tokenizer, lines, length, depth, rng, options.digits)
        return passkey_prompt(tokenizer, length, depth, rng, options.digits)

    forward = loaded.forward(options.chunk, options.offload_activations)
    rows: list[Row] = []
    with progress(options.kind, len(lengths), show=loaded.group.rank == 0) as advance:
        for number, length in enumerate(lengths, 1):
            rescale = choose(length)
            same = {name: getattr(options, name) for name in ("kind", "trials", "digits", "seed")}
            answered = unfinished.answers(loaded, [rescale], length=length, of=hashes, **same)
            found = retrieve(
                forward,
                make,
                length,
                rescale,
                trials=options.trials,
                seed=options.seed,
                answered=answered,
            )
            rows += found
            right, trials = sum(r.correct for r in found), sum(r.trials for r in found)
            advance(number, f"{right} of {trials} at {length:,}")
    return rows
