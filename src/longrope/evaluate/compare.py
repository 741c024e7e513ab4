"""Methods and searched factors side by side, at several lengths, on the same tokens."""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longrope.data import check_sources
from longrope.evaluate.perplexity import Scores, check_lengths, paired_difference, score
from longrope.evaluate.unfinished import Unfinished
from longrope.facts import ModelFacts, load_rescale
from longrope.files import write_atomically
from longrope.model import LoadedModel
from longrope.progress import progress
from longrope.rope.install import check_fits, installed
from longrope.rope.methods import METHODS
from longrope.rope.rescale import Rescale
from longrope.search.problem import starting_point
from longrope.windows import (
    TokenDocument,
    bos_token,
    load_documents,
    pack,
    parse_length,
    unseen,
)

log = logging.getLogger(__name__)

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """What an evaluation may be told; see ``longrope compare --help``.

    With ``own_attention_factors`` every method stands there twice: with the one
    attention factor that all share, and with its own where that differs.
    """

    methods: tuple[str, ...]
    lengths: tuple[str, ...]
    target: str | None = None
    data: tuple[str, ...] = ()
    field: str = "text"
    pack: bool = False
    stride: int | None = None
    tokens_per_document: int | None = None
    attention_factor: float | None = None
    own_attention_factors: bool = False
    chunk: int | None = None
    hidden_device: str | None = None

    def check(self, facts: ModelFacts) -> None:
        """Refuse what cannot work on a model, before its weights are read.

        Raises:
            ValueError: an unknown method, a rescale file of another shape, no length, or
                data that is not there.
        """
        lengths, _ = self.resolve(facts)
        check_lengths(lengths, self.stride)
        for name in ("tokens_per_document", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        assert facts.rotary_dim and facts.rope_theta
        for entry in self.entries(facts):
            rescale = entry.rescale(lengths[-1])
            check_fits(rescale, facts.rotary_dim // 2, facts.rope_theta)
            made_for = rescale.max_position_embeddings
            if entry.name in set(self.methods) - set(METHODS) and made_for < lengths[-1]:
                log.warning(
                    "%s is made for %s tokens, and measured at %s",
                    entry.name,
                    f"{made_for:,}",
                    f"{lengths[-1]:,}",
                )
        check_sources(self.data)

    def require_all_of(self, file: Path, facts: ModelFacts) -> None:
        """See that a comparison which is there already is this one, or a part of it.

        Raises:
            ValueError: it has another target, or methods or lengths that this one has not.
        """
        if not file.exists():
            return
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
            rows = {(row["method"], row["length"]) for row in there["perplexity"]}
            before, of = there["target"], there.get("of")  # of an older version's is not known
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}: no comparison is in it; give another --out") from None
        lengths, target = self.resolve(facts)
        rows -= {(entry.name, length) for entry in self.entries(facts) for length in lengths}
        other = [f"for {before:,} tokens"] if before != target else []
        other += [f"with {name} at {length:,}" for name, length in sorted(rows)[:3]]
        now = self.of(facts)
        other += [f"of {key} {of.get(key)}" for key in now if of and of.get(key) != now[key]]
        if other:
            raise ValueError(
                f"{file}: holds another comparison ({', '.join(other)}); give another --out, or "
                "delete it"
            )

    def of(self, facts: ModelFacts) -> dict[str, Any]:
        """What is compared, beside methods and lengths."""
        keys = ("data", "field", "pack", "stride", "tokens_per_document", "attention_factor")
        asked = {key: getattr(self, key) for key in keys}
        return json.loads(json.dumps({"model": facts.source} | asked))

    def entries(self, facts: ModelFacts) -> list["Entry"]:
        """What is scored: a line per method and file."""
        return _entries(facts, self, self.resolve(facts)[1])

    def resolve(self, facts: ModelFacts) -> tuple[list[int], int]:
        """Lengths in tokens, ascending, and the length that methods are made for."""
        original = facts.original_max_position_embeddings
        assert original is not None
        lengths = sorted({parse_length(text, original) for text in self.lengths})
        target = parse_length(self.target, original) if self.target else lengths[-1]
        return lengths, max(target, original)

    @property
    def directory(self) -> Path:
        """Where the result goes by itself: beside the first rescale file."""
        files = [Path(name) for name in self.methods if name not in METHODS]
        return files[0].parent if files else Path("compare")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a comparison: a name, and the rescale for a sequence of some length."""

    name: str
    rescale: Callable[[int], Rescale]


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


def finite_or_none(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


def run_comparison(
    loaded: LoadedModel,
    options: CompareOptions,
    *,
    exclude_searched: bool,
    unfinished: Unfinished,
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
    facts = loaded.facts
    lengths, target = options.resolve(facts)
    entries = entries or options.entries(facts)
    documents = load_documents(loaded.tokenizer, options.data, field=options.field, held_out=True)
    documents = _held_out(documents, options.methods, exclude_searched)
    if options.pack:
        documents = [pack(documents, bos_token(loaded.tokenizer), loaded.tokenizer.eos_token_id)]
    scores = _score_all(loaded, options, entries, documents, lengths, unfinished)
    named = [entry.name for entry in entries if entry.name in options.methods]
    named = named or [entry.name for entry in entries]
    subject = next((name for name in named if name not in METHODS), named[-1])
    assert facts.original_max_position_embeddings
    original = facts.original_max_position_embeddings
    return Comparison(original, target, subject, scores, options.of(facts))


def _entries(facts: ModelFacts, options: CompareOptions, target: int) -> list[Entry]:
    """A line per method, made for ``target``, and per file; raises for what is neither."""
    shared = options.attention_factor
    named = [name for name in options.methods if name not in METHODS]
    files = {name: load_rescale(name, facts, target) for name in named}
    if shared is None and options.own_attention_factors:
        shared = next((file.attention_factor for file in files.values()), None)
        if shared is None:
            shared = starting_point(facts, target, None).attention_factor
    entries = []
    for name in options.methods:
        if name in files:
            entries.append(Entry(name, lambda length, file=files[name]: file))
            continue
        own = Entry(name, lambda length, name=name: facts.rescale(name, target, length))
        factor = own.rescale(target).attention_factor
        if shared is None or name == "none" or factor == shared:
            entries.append(own)
            continue
        entries.append(
            Entry(
                name, lambda length, own=own: own.rescale(length).replace(attention_factor=shared)
            )
        )
        if options.own_attention_factors:
            entries.append(Entry(f"{name} (attention factor {factor:.4g})", own.rescale))
    return entries


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
    unfinished: Unfinished,
) -> dict[tuple[str, int], Scores]:
    bos = bos_token(loaded.tokenizer)
    asked = {"lengths": lengths, "stride": options.stride, "bos": bos}
    forward = loaded.forward(options.chunk, options.hidden_device)
    scores: dict[tuple[str, int], Scores] = {}
    with progress("evaluate", len(entries) * len(lengths), show=loaded.team.rank == 0) as advance:
        for entry in entries:
            for length in lengths:
                rescale = entry.rescale(length)
                known = unfinished.losses(loaded, rescale, length=length, **asked)
                with installed(loaded.model, rescale):
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
