"""Comparison of rescaling methods and searched factors on the same tokens."""

import dataclasses
import itertools
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longrope.data.encoding import bos_tokens
from longrope.data.windows import (
    TokenDocument,
    load_documents,
    unsearched_half,
)
from longrope.data.windows import pack as packed
from longrope.evaluate.benchmarks import require_benchmark_data
from longrope.evaluate.cache import MeasurementCache
from longrope.evaluate.lm_eval_tasks import is_ruler
from longrope.evaluate.measure import (
    Measurement,
    measure_all,
    model_identity,
)
from longrope.evaluate.perplexity import Scores, paired_difference
from longrope.evaluate.settings import BenchmarkConfig, PerplexityConfig
from longrope.evaluate.statistics import benchmark_difference
from longrope.files.atomic import write_atomically
from longrope.files.parse import read_json
from longrope.files.stores import finite_or_none
from longrope.models.info import ModelInfo
from longrope.models.load import LoadedModel
from longrope.models.target_length import starting_point
from longrope.rope.apply import check_fits
from longrope.rope.methods import METHODS
from longrope.rope.rescale import Rescale, load_rescale
from longrope.units import parse_length

log = logging.getLogger(__name__)

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class ComparedMethod:
    """One row of a comparison: a method or a rescale file.

    Args:
        name: the method's name or the path of a rescale file.
        rescale: returns the rescale for a sequence of so many tokens.
        is_file: whether the factors come from a file.
    """

    name: str
    rescale: Callable[[int], Rescale]
    is_file: bool = False


def resolve_lengths(
    info: ModelInfo, lengths: Sequence[str], target: str | None
) -> tuple[list[int], int]:
    """Resolve the context lengths of an evaluation or comparison, and the methods' target.

    Returns:
        The lengths in tokens, ascending, and the target. The default target is the longest
        length, but at least the original length.

    Raises:
        ValueError: an invalid length, or a target below the model's original length.
    """
    original = info.original_max_position_embeddings
    assert original is not None
    tokens = sorted({parse_length(text, original) for text in lengths})
    if target and parse_length(target, original) < original:
        raise ValueError(
            f"target is {target}, but the model handles {original:,} tokens already; give a "
            f"target of at least {original:,}"
        )
    return tokens, parse_length(target, original) if target else max(tokens[-1], original)


def method_entries(
    info: ModelInfo,
    methods: Sequence[str],
    target: int,
    *,
    attention_factor: float | None = None,
    own_attention_factors: bool = False,
) -> list[ComparedMethod]:
    """Return the rows of a comparison: one per method for ``target`` tokens, one per file.

    Args:
        attention_factor: attention factor for every method; None keeps each method's own.
        own_attention_factors: give all methods one attention factor (that of the first file,
            else the search's default), and add a row where a method's own differs.

    Raises:
        ValueError: neither a method nor a rescale file of this model's shape, or an attention
            factor that no method can have.
    """
    shared = attention_factor
    if shared is not None and not 0 < shared < math.inf:
        raise ValueError(f"attention_factor is {shared}; it must be positive and finite")
    named = [name for name in methods if name not in METHODS]
    files = {name: load_rescale(name, info.rescale("none", target)) for name in named}
    if shared is None and own_attention_factors:
        shared = next((file.attention_factor for file in files.values()), None)
        if shared is None:
            shared = starting_point(info, target, None).attention_factor
    entries = []
    for name in methods:
        if name in files:
            entries.append(
                ComparedMethod(name, lambda length, file=files[name]: file, is_file=True)
            )
            continue
        own = ComparedMethod(name, lambda length, name=name: info.rescale(name, target, length))
        factor = own.rescale(target).attention_factor
        if shared is None or name == "none" or factor == shared:
            entries.append(own)
            continue
        entries.append(
            ComparedMethod(
                name, lambda length, own=own: own.rescale(length).replace(attention_factor=shared)
            )
        )
        if own_attention_factors:
            entries.append(ComparedMethod(f"{name} (attention factor {factor:.4g})", own.rescale))
    return entries


def check_entries(info: ModelInfo, entries: Sequence[ComparedMethod], longest: int) -> None:
    """Check that all factors to compare fit the model; warn about files for a shorter target.

    Raises:
        ValueError: a rescale of another shape.
    """
    assert info.rotary_dim and info.rope_theta
    for entry in entries:
        rescale = entry.rescale(longest)
        check_fits(rescale, info.rotary_dim // 2, info.rope_theta)
        made_for = rescale.max_position_embeddings
        if entry.is_file and made_for < longest:
            log.warning(
                "%s is made for %s tokens, but is measured at %s",
                entry.name,
                f"{made_for:,}",
                f"{longest:,}",
            )


def check_same_comparison(
    file: Path,
    entries: Sequence[ComparedMethod],
    lengths: Sequence[int],
    target: int,
    of: Mapping[str, Any],
) -> None:
    """Check that an existing ``compare.json`` belongs to this comparison and has no other rows.

    Raises:
        ValueError: it has another target, other settings, or rows that this one lacks.
    """
    if not file.exists():
        return
    try:
        there = read_json(file)
        rows = {(row["method"], row["length"]) for row in there["perplexity"]}
        before, settings = there["target"], there.get("of")  # unknown in files of old versions
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(
            f"{file} does not hold a comparison; give another `out`, or delete the file"
        ) from None
    rows -= {(entry.name, length) for entry in entries for length in lengths}
    other = [f"target {before:,}"] if before != target else []
    other += [f"row {name} at {length:,}" for name, length in sorted(rows)[:3]]
    now = json.loads(json.dumps(of))
    other += [
        f"{key} {settings.get(key)}" for key in now if settings and settings.get(key) != now[key]
    ]
    if other:
        raise ValueError(
            f"{file} holds another comparison ({', '.join(other)}); give another `out`, or "
            "delete the file"
        )


def perplexity_documents(
    tokenizer: Any,
    data: Sequence[str],
    methods: Sequence[str],
    *,
    field: str,
    pack: bool,
    exclude: bool,
) -> list[TokenDocument]:
    """Load the documents to compare methods on; omit, or warn about, those used by a search.

    Args:
        data: sources, as of :func:`longrope.data.documents.read_documents`.
        methods: methods and rescale files; documents that a file was searched on are left out
            with ``exclude``, else warned about.
        pack: join all documents into one.

    Raises:
        ValueError: the data cannot be read, or every document was searched on.
    """
    documents = load_documents(tokenizer, data, field)
    documents = _not_searched_on(documents, methods, exclude=exclude)
    if pack:
        return [packed(documents, bos_tokens(tokenizer), tokenizer.eos_token_id)]
    return documents


def _not_searched_on(
    documents: list[TokenDocument], methods: Sequence[str], *, exclude: bool
) -> list[TokenDocument]:
    """Return the documents that no rescale file of the comparison was searched on.

    Without ``exclude`` such documents stay, with a warning.

    Raises:
        ValueError: every document was searched on.
    """
    files = [Rescale.load(name) for name in methods if Path(name).suffix == ".json"]
    remaining, number = [], 0
    for document in documents:
        used = [file for file in files if set(file.searched_documents) & set(document.sha256)]
        number += bool(used)
        remaining += _spared(document, used) if exclude else [document]
    if not number:
        return documents
    if not exclude:
        log.warning("%d documents were used by the search", number)
        return documents
    if not remaining:
        raise ValueError("all documents were used by the search; give others as `data`")
    log.warning("%d documents are left out, or parts of them, that the search used", number)
    return remaining


def _spared(document: TokenDocument, files: Sequence[Rescale]) -> list[TokenDocument]:
    """Return what the searches of these files spared of a document: all, a half or nothing."""
    if not files:
        return [document]
    gap = max(file.max_position_embeddings for file in files)
    halves = [unsearched_half(document, file.searched_documents, gap) for file in files]
    return [half for half in halves[:1] if half is not None and None not in halves]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Comparison of methods: perplexity scores by (method, length), all on the same tokens.

    Args:
        original_length: tokens that the model handled before it was extended.
        target: tokens that the methods are for.
        subject: the method that the others are compared with.
        scores: losses of every token.
        of: settings of the comparison beside methods and lengths.
    """

    original_length: int
    target: int
    subject: str
    scores: dict[tuple[str, int], Scores]
    of: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """Return the ``perplexity`` rows of ``compare.json``."""
        return [
            perplexity_row(method, scores, self.original_length)
            for (method, _), scores in self.scores.items()
        ]

    def differences(self) -> list[dict[str, Any]]:
        """Return the ``differences`` of ``compare.json``: every pair of methods, nats per token.

        The subject's pairs stand first. ``better`` is None where the measurement cannot tell.
        """
        names = list(dict.fromkeys(name for name, _ in self.scores))
        names.sort(key=lambda name: name != self.subject)
        rows = []
        for length in sorted({length for _, length in self.scores}):
            for method, other in itertools.combinations(names, 2):
                difference = paired_difference(
                    self.scores[method, length], self.scores[other, length]
                )
                rows.append(
                    {
                        "length": length,
                        "method": method,
                        "against": other,
                        "mean": finite_or_none(difference.mean),
                        "standard_error": difference.standard_error,
                        "better": difference.better,
                    }
                )
        return rows

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``compare.json``."""
        return {
            "schema": SCHEMA,
            "original_length": self.original_length,
            "target": self.target,
            "of": dict(self.of),
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
        """Write ``compare.json`` atomically."""
        write_atomically(path, json.dumps(self.to_json(), indent=1) + "\n")


def perplexity_row(method: str, scores: Scores, original: int) -> dict[str, Any]:
    """Return the perplexity row of a comparison for one method and length.

    Beyond ``original`` tokens it includes ``tail_perplexity``.
    """
    row = {
        "length": scores.length,
        "method": method,
        "perplexity": finite_or_none(scores.perplexity),
        "standard_error": scores.standard_error,
        "tokens": scores.tokens,
        "windows": scores.windows,
        "documents": len(scores.documents),
    }
    if scores.length > original:
        row["tail_perplexity"] = finite_or_none(scores.tail(original).perplexity)
    return row


def compare_perplexity(
    loaded: LoadedModel,
    entries: Sequence[ComparedMethod],
    target: int,
    documents: Sequence[TokenDocument],
    options: PerplexityConfig,
    cache: MeasurementCache,
    of: Mapping[str, Any] | None = None,
) -> Comparison:
    """Compare the perplexity of methods and rescale files at every length, on the same tokens.

    The subject is the first rescale file, else the last method.

    Raises:
        ValueError: too few tokens.
    """
    model = model_identity(loaded)
    wanted = {
        (entry.name, length): Measurement(
            "perplexity", model, entry.rescale, length, options, documents
        )
        for entry in entries
        for length in options.lengths
    }
    found = measure_all(loaded, list(wanted.values()), cache)
    files = [entry.name for entry in entries if entry.is_file]
    subject = files[0] if files else [e.name for e in entries if e.name in METHODS][-1]
    original = loaded.info.original_max_position_embeddings
    assert original
    scores = dict(zip(wanted, found, strict=True))
    return Comparison(original, target, subject, scores, of or {})


def compare_benchmarks(
    loaded: LoadedModel,
    choose: Callable[[int], Rescale],
    longest: int,
    original: LoadedModel | None,
    options: BenchmarkConfig,
    cache: MeasurementCache,
) -> list[dict[str, Any]]:
    """Compare the benchmark scores of an extended model with those of the original model.

    Returns one :func:`benchmark_difference` row per task; for RULER, per task and length.

    Args:
        choose: the extended model's rescale for a sequence of so many tokens.
        longest: tokens that the extended model is for.
        original: the model to compare with; None takes the same weights, unscaled.

    Raises:
        ValueError: as :func:`~longrope.evaluate.benchmarks.require_benchmark_data`; or two
            tokenizers for RULER. Both are raised before any question.
    """
    before = original or loaded
    window = before.info.original_max_position_embeddings
    assert window is not None
    same = before.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    if not same and any(is_ruler(task) for task in options.tasks):
        raise ValueError(
            "`original` has another tokenizer, and RULER's texts depend on it; give a model with "
            "the same tokenizer"
        )
    require_benchmark_data(options, before.tokenizer, min(window, longest))
    unscaled = before.info.rescale("none", window)
    single = [options.model_copy(update={"tasks": (task,)}) for task in options.tasks]

    def scores(model: LoadedModel, chosen: Callable[[int], Rescale], tokens: int) -> list[Any]:
        identity = model_identity(model)
        wanted = [Measurement("benchmark", identity, chosen, tokens, task) for task in single]
        return measure_all(model, wanted, cache)

    base = scores(before, lambda tokens: unscaled, window)
    extended = scores(loaded, choose, longest)
    return [
        benchmark_difference(row, answers.get(row, {}), found[row])
        for answers, found in zip(base, extended, strict=True)
        for row in found
    ]
