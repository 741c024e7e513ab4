"""How a model's context is extended: the file to read first.

A model and documents come in; factors come out. So far the one stage there is is
the search of the rescale factors::

    model ─ facts ─┐
                   ├─▶ windows ─▶ search ─▶ rescale.json, portable.json
    documents ─────┘

Everything a stage computes lands in its directory as it is computed, and running
the same stage again goes on from there.
"""

import dataclasses
import hashlib
import platform
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import longrope
from longrope.data import Document, check_sources, library_documents, read_documents
from longrope.forward import DEFAULT_CHUNK, LongForward
from longrope.model import LoadedModel, ModelFacts, find_device
from longrope.parallel import Ranks
from longrope.progress import Advance, console, duration, progress
from longrope.rope.rescale import Rescale, default_attention_factor
from longrope.search.evolution import EvolutionSettings
from longrope.search.objective import Perplexity
from longrope.search.record import SearchConfig
from longrope.search.run import ALGORITHMS, Progress, SearchResult, search
from longrope.search.space import START_TOKENS, Space
from longrope.windows import (
    TokenDocument,
    bos_token,
    half,
    pack,
    parse_length,
    search_windows,
    tokenize,
)

# The first population of Algorithm 1, beside their mutants.
STARTS = ("pi", "ntk", "yarn")


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """What a search may be told; see ``longrope search --help``."""

    target: str
    out: Path
    data: tuple[str, ...] = ()
    field: str = "text"
    pack: bool = False
    samples: int = 5
    algorithm: str = "paper"
    budget: int | None = None
    patience: int | None = None
    seed: int = 0
    attention_factor: float | None = None
    start_tokens: int | None = None
    upper: float | None = None
    chunk: int = DEFAULT_CHUNK
    hidden_device: str | None = None
    settings: EvolutionSettings = dataclasses.field(default_factory=EvolutionSettings)

    def __post_init__(self) -> None:
        for name in ("samples", "budget", "patience", "upper", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 1")
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise ValueError(f"--attention-factor is {self.attention_factor}; it must be positive")
        if self.start_tokens is not None and self.start_tokens < 0:
            raise ValueError(f"--start-tokens is {self.start_tokens}; it must not be negative")
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"--algorithm {self.algorithm}: there is {', '.join(ALGORITHMS)}")

    def check(self, facts: ModelFacts) -> None:
        """Refuse what cannot work on a model, before its weights are read.

        Raises:
            ValueError: a target that is no extension, or data that is not there.
        """
        extension_target(self.target, facts)
        check_sources(self.data)


def search_factors(loaded: LoadedModel, options: SearchOptions, ranks: Ranks) -> SearchResult:
    """Search the rescale factors for a target length, or go on where it was interrupted.

    Leaves ``rescale.json`` (the best), ``portable.json`` (the best that engines can
    load, n̂ = 0), ``history.jsonl`` (every evaluation) and ``state.json`` in
    ``options.out``.

    Raises:
        ValueError: an option out of range, too few tokens, or a directory that holds
            another search; before any long work.
    """
    facts = loaded.facts
    target = extension_target(options.target, facts)
    start = starting_point(facts, target, options.attention_factor)
    start_tokens = START_TOKENS if options.start_tokens is None else (options.start_tokens,)
    space = Space(start, options.upper or 1.25 * start.scale, start_tokens)
    starts = {
        name: space.nearest(facts.rescale(name, target).replace(start_tokens=start_tokens[0]))
        for name in STARTS
    }

    bos = bos_token(loaded.tokenizer)
    documents = load_documents(loaded, options.data, field=options.field, held_out=False)
    if options.pack:
        documents = half(documents, random.Random(options.seed))
        documents = [pack(documents, bos, loaded.tokenizer.eos_token_id)]
    windows = search_windows(documents, target, options.samples, options.seed, bos)
    config = SearchConfig(
        model=loaded.fingerprint(),
        documents=tuple(h for document in windows.documents for h in document.sha256),
        windows=hashlib.sha256(windows.ids.tobytes()).hexdigest(),
        length=target,
        algorithm=options.algorithm,
        settings=options.settings,
        seed=options.seed,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        device=loaded.model.device.type,
        chunk=options.chunk,
        start={k: v for k, v in start.to_json().items() if k != "provenance"},
        upper=space.upper,
        start_tokens=space.start_tokens,
    )
    hidden = options.hidden_device and find_device("--hidden-device", options.hidden_device)
    forward = LongForward(loaded.model, options.chunk, hidden or None)
    names = ", ".join(document.name for document in windows.documents)
    headline = (
        f"{facts.architecture}, {start.original_max_position_embeddings:,} → {target:,} tokens "
        f"({start.scale:g}×); {len(windows.ids)} windows of {names}"
    )
    total = min(options.budget or options.settings.evaluations, options.settings.evaluations)
    with progress("search", total, show=ranks.first) as advance:
        return search(
            config,
            space,
            starts,
            Perplexity(forward, windows.ids),
            options.out,
            ranks=ranks,
            budget=options.budget,
            patience=options.patience,
            provenance={
                "model": facts.source,
                "base_factors": list(facts.base_factors),
                "document_names": [document.name for document in windows.documents],
                "longrope": longrope.__version__,
                "python": platform.python_version(),
            },
            report=_Reporter(headline, advance) if ranks.first else lambda now: None,
        )


class _Reporter:
    """Say how a search goes: what it is, how long it will take, then the best so far."""

    def __init__(self, headline: str, advance: Advance):
        self.headline = headline
        self.advance = advance
        self.estimated = False

    def __call__(self, now: Progress) -> None:
        if now.evaluations == 0:
            console.print(self.headline, highlight=False)
            return
        if not self.estimated and now.seconds_left is not None:
            self.estimated = True
            console.print(
                f"{now.total - now.evaluations} evaluations to go, about "
                f"{duration(now.seconds_left)}; it can be stopped and run again at any time",
                highlight=False,
            )
        if now.replayed and now.evaluations < now.total:
            return
        starts = " ".join(f"{name} {loss:.4f}" for name, loss in now.starts.items())
        left = "" if now.seconds_left is None else f", {duration(now.seconds_left)} left"
        self.advance(now.evaluations, f"best {now.best:.4f} ({starts}){left}")


def extension_target(text: str, facts: ModelFacts) -> int:
    """The target length in tokens.

    Raises:
        ValueError: not a length, or not beyond the model's original length.
    """
    original = facts.original_max_position_embeddings
    assert original is not None
    target = parse_length(text, original)
    if target <= original:
        raise ValueError(
            f"--target is {target:,} tokens; this model handles {original:,} already "
            f"({facts.original_read_from}), so give a larger target such as 8x"
        )
    return target


def starting_point(facts: ModelFacts, target: int, attention_factor: float | None) -> Rescale:
    """The rescale that every candidate multiplies; it carries the one attention factor.

    By default that is √(1 + ln s / ln L), on top of what the model has and keeps.
    """
    start = facts.rescale("none", target)
    if attention_factor is None:
        original = start.original_max_position_embeddings
        attention_factor = default_attention_factor(original, target) * start.attention_factor
    return start.replace(attention_factor=attention_factor)


def load_documents(
    loaded: LoadedModel,
    data: Sequence[str],
    *,
    field: str = "text",
    held_out: bool,
) -> list[TokenDocument]:
    """Tokens of the documents given, or of the Python library where none are.

    Of the library, ``held_out`` chooses the packages that the bundled model never saw.
    """
    documents: list[Document] = read_documents(data, field) if data else library_documents(held_out)
    return tokenize(documents, loaded.tokenizer)


def summary(result: SearchResult, out: Path) -> dict[str, Any]:
    """What ``longrope search --json`` prints."""
    return {
        "rescale": str(out / "rescale.json"),
        "portable": str(out / "portable.json") if result.portable else None,
        "history": str(out / "history.jsonl"),
        "loss": result.best_loss,
        "portable_loss": result.portable_loss,
        "start_tokens": result.best.start_tokens,
        "starts": result.starts,
        "evaluations": result.evaluations,
        "computed": result.computed,
        "not_finite": result.not_finite,
    }
