"""Methods and searched factors side by side, at several lengths, on the same tokens."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longrope.data.windows import TokenDocument, bos_token, load_documents, pack, unseen
from longrope.evaluate.cache import MeasurementCache
from longrope.evaluate.options import CompareOptions, Entry
from longrope.evaluate.perplexity import Scores, paired_difference, score
from longrope.evaluate.statistics import finite_or_none
from longrope.files import write_atomically
from longrope.models.load import LoadedModel
from longrope.progress import progress
from longrope.rope.apply import rescaled
from longrope.rope.methods import METHODS
from longrope.rope.rescale import Rescale

log = logging.getLogger(__name__)

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Scores by (method, length); every length is scored on the same tokens.

    ``subject`` is the method that the others are compared with: the first rescale
    file, or the last of the methods.
    """

    original_length: int
    target: int
    subject: str
    scores: dict[tuple[str, int], Scores]
    of: dict[str, Any] = dataclasses.field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """The ``perplexity`` rows of the JSON output."""
        rows = []
        for (method, length), scores in self.scores.items():
            row = {
                "length": length,
                "method": method,
                "perplexity": finite_or_none(scores.perplexity),
                "standard_error": scores.standard_error,
                "tokens": scores.tokens,
                "windows": scores.windows,
                "documents": len(scores.documents),
            }
            if length > self.original_length:
                tail = scores.tail(self.original_length)
                row["tail_perplexity"] = finite_or_none(tail.perplexity)
            rows.append(row)
        return rows

    def differences(self) -> list[dict[str, Any]]:
        """The subject against every other at each length: paired, in nats per token."""
        rows = []
        for (other, length), scores in self.scores.items():
            if other == self.subject:
                continue
            difference = paired_difference(self.scores[self.subject, length], scores)
            rows.append(
                {
                    "length": length,
                    "method": self.subject,
                    "against": other,
                    "mean": finite_or_none(difference.mean),
                    "standard_error": difference.standard_error,
                    "better": difference.better,
                }
            )
        return rows

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "original_length": self.original_length,
            "target": self.target,
            "of": self.of,
            "perplexity": self.rows(),
            "differences": self.differences(),
            "by_position": [
                {
                    "method": method,
                    "length": length,
                    "buckets": [(a, b, finite_or_none(p)) for a, b, p in scores.by_position()],
                }
                for (method, length), scores in self.scores.items()
            ],
        }

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(self.to_json(), indent=1) + "\n")


def run_comparison(
    loaded: LoadedModel,
    options: CompareOptions,
    *,
    exclude_searched: bool,
    unfinished: MeasurementCache,
    entries: Sequence[Entry] | None = None,
) -> Comparison:
    """Score methods and rescale files at several lengths.

    Without ``data`` the documents are the library packages that the bundled model
    never saw. ``exclude_searched`` leaves out documents that a rescale file was
    searched on; otherwise their presence is only warned of. ``entries`` are scored instead
    of the options' methods. What is ``unfinished`` goes on.

    Raises:
        ValueError: an unknown method, a rescale of another shape, too few tokens.
    """
    info = loaded.info
    lengths, target = options.resolve(info)
    entries = entries or options.entries(info)
    documents = load_documents(loaded.tokenizer, options.data, field=options.field, held_out=True)
    documents = _held_out(documents, options.methods, exclude_searched)
    if options.pack:
        documents = [pack(documents, bos_token(loaded.tokenizer), loaded.tokenizer.eos_token_id)]
    scores = _score_all(loaded, options, entries, documents, lengths, unfinished)
    named = [entry.name for entry in entries if entry.name in options.methods]
    named = named or [entry.name for entry in entries]
    subject = next((name for name in named if name not in METHODS), named[-1])
    assert info.original_max_position_embeddings
    original = info.original_max_position_embeddings
    return Comparison(original, target, subject, scores, options.of(info))


def _held_out(
    documents: list[TokenDocument], methods: Sequence[str], exclude: bool
) -> list[TokenDocument]:
    searched = [
        digest
        for name in methods
        if Path(name).suffix == ".json"
        for digest in Rescale.load(name).provenance.get("documents", ())
    ]
    kept = unseen(documents, searched)
    if len(kept) == len(documents):
        return documents
    if not exclude:
        log.warning("%d documents were searched on", len(documents) - len(kept))
        return documents
    if not kept:
        raise ValueError("every document given was searched on; give others with --data")
    log.warning("%d documents left out: they were searched on", len(documents) - len(kept))
    return kept


def _score_all(
    loaded: LoadedModel,
    options: CompareOptions,
    entries: Sequence[Entry],
    documents: Sequence[TokenDocument],
    lengths: Sequence[int],
    unfinished: MeasurementCache,
) -> dict[tuple[str, int], Scores]:
    bos = bos_token(loaded.tokenizer)
    asked = {"lengths": lengths, "stride": options.stride, "bos": bos}
    forward = loaded.forward(options.chunk, options.offload_activations)
    scores: dict[tuple[str, int], Scores] = {}
    with progress("evaluate", len(entries) * len(lengths), show=loaded.group.rank == 0) as advance:
        for entry in entries:
            for length in lengths:
                rescale = entry.rescale(length)
                known = unfinished.losses(loaded, rescale, length=length, **asked)
                with rescaled(loaded.model, rescale):
                    found = score(
                        forward,
                        documents,
                        length,
                        bos=bos,
                        lengths=lengths,
                        stride=options.stride,
                        tokens_per_document=options.tokens_per_document,
                        known=known,
                    )
                scores[entry.name, length] = found
                advance(len(scores), f"{entry.name} at {length:,}: {found.perplexity:.2f}")
    return scores
