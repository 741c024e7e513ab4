"""A search as a stage of work: windows in, files of factors out; run again, it resumes."""

import dataclasses
import hashlib
import math
import platform
import random
from collections.abc import Sequence
from pathlib import Path

import torch

import longrope
from longrope.data import check_sources
from longrope.evaluate.retrieval import Prompt
from longrope.facts import ModelFacts
from longrope.files import require_directory
from longrope.gradient import forwards as slope_forwards
from longrope.gradient import require_slope
from longrope.model import LoadedModel, warn_if_out_of_reach
from longrope.parallel import Ranks
from longrope.progress import Advance, console, duration, progress
from longrope.rope.rescale import Rescale
from longrope.search.descent import DescentSettings
from longrope.search.evaluations import Progress, SearchResult
from longrope.search.evolution import EvolutionSettings
from longrope.search.objective import Objective, passkey_questions
from longrope.search.problem import Problem, first_search, require_start_tokens
from longrope.search.record import SearchConfig, refuse_another_s
from longrope.search.run import ALGORITHMS, search
from longrope.search.space import START_TOKENS, Price
from longrope.windows import (
    Windows,
    bos_token,
    half,
    load_documents,
    pack,
    parse_extension,
    search_windows,
)


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """How a search goes about it, whatever it searches.

    ``passkeys``: questions asked of every candidate beside the ``samples`` windows. ``budget`` is
    in forward equivalents (all of them once), ``rate`` and ``step_windows`` the fast algorithm's,
    ``settings`` and ``patience`` the paper's.

    Raises:
        ValueError: a count below 1, no such algorithm, or an option of the other one.
    """

    samples: int = 5
    passkeys: int = 0
    algorithm: str = "fast"
    budget: int | None = None
    patience: int | None = None
    seed: int = 0
    chunk: int | None = None
    hidden_device: str | None = None
    rate: float = DescentSettings.rate
    step_windows: int = DescentSettings.step_windows
    settings: EvolutionSettings = dataclasses.field(default_factory=EvolutionSettings)

    def __post_init__(self) -> None:
        for name in ("samples", "budget", "patience", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 1")
        if self.passkeys < 0:
            raise ValueError(f"--passkeys is {self.passkeys}; it must not be negative")
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"--algorithm {self.algorithm}: there is {', '.join(ALGORITHMS)}")
        if self.patience is not None and self.algorithm == "fast":
            raise ValueError(
                f"--patience is {self.patience}; the fast search has no generations to wait for: "
                "leave it out, or give --algorithm paper"
            )
        if self.algorithm == "fast" and self.settings != EvolutionSettings():
            changed = [
                f"--{field.name} {value}"
                for field in dataclasses.fields(EvolutionSettings)
                if (value := getattr(self.settings, field.name)) != field.default
            ]
            raise ValueError(f"{', '.join(changed)}: settings of --algorithm paper; this is fast")
        of_fast = (DescentSettings.rate, DescentSettings.step_windows)
        if self.algorithm == "paper" and (self.rate, self.step_windows) != of_fast:
            raise ValueError(
                f"--rate {self.rate}, --step-windows {self.step_windows}: settings of --algorithm "
                "fast; this is paper"
            )
        most = self.of_algorithm().forwards
        if self.budget is not None and self.budget > most:
            raise ValueError(
                f"--budget is {self.budget}, and so many generations end after {most}: raise "
                "--iterations or --population"
            )

    def of_algorithm(self) -> EvolutionSettings | DescentSettings:
        """The settings of the algorithm chosen."""
        if self.algorithm == "paper":
            return self.settings
        return DescentSettings(
            self.budget or DescentSettings.forwards, self.rate, self.step_windows
        )

    @property
    def forwards(self) -> int:
        """The budget in forward equivalents: all windows and questions once are one."""
        return self.budget or self.of_algorithm().forwards


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """What ``longrope search`` may be told; see its ``--help``."""

    target: str
    out: Path
    data: tuple[str, ...] = ()
    field: str = "text"
    pack: bool = False
    attention_factor: float | None = None
    start_tokens: int | None = None
    upper: float | None = None
    how: SearchSettings = dataclasses.field(default_factory=SearchSettings)

    def __post_init__(self) -> None:
        if self.upper is not None and not 1 <= self.upper < math.inf:
            raise ValueError(f"--upper is {self.upper}; it must be at least 1, and finite")
        factor = self.attention_factor
        if factor is not None and not 0 < factor < math.inf:
            raise ValueError(f"--attention-factor is {factor}; it must be positive and finite")
        if self.start_tokens is not None and self.start_tokens < 0:
            raise ValueError(f"--start-tokens is {self.start_tokens}; it must not be negative")

    def check(self, facts: ModelFacts) -> None:
        """Refuse what cannot work on a model, before its weights are read.

        Raises:
            ValueError: a target that is no extension, data that is not there, or an ``out`` that
                holds something else.
        """
        parse_extension(self.target, facts)
        require_start_tokens(self.start_tokens or 0, facts)
        check_sources(self.data)
        require_directory(self.out)
        refuse_another_s(self.out)


def search_factors(loaded: LoadedModel, options: SearchOptions, ranks: Ranks) -> SearchResult:
    """Search the rescale factors for a target length, or go on where it was interrupted.

    Leaves ``rescale.json`` (the best), ``portable.json`` (the best that engines can
    load, n̂ = 0), ``history.jsonl`` (every evaluation) and ``state.json`` in
    ``options.out``.

    Raises:
        ValueError: an option out of range, too few tokens, or a directory that holds
            another search; before any long work.
    """
    target = parse_extension(options.target, loaded.facts)
    problem = first_search(
        loaded.facts,
        target,
        attention_factor=options.attention_factor,
        start_tokens=START_TOKENS if options.start_tokens is None else (options.start_tokens,),
        upper=options.upper,
    )
    bos, seed = bos_token(loaded.tokenizer), options.how.seed
    documents = load_documents(loaded.tokenizer, options.data, field=options.field, held_out=False)
    if options.pack:
        documents = half(documents, random.Random(seed))
        documents = [pack(documents, bos, loaded.tokenizer.eos_token_id)]
    windows = search_windows(documents, target, options.how.samples, seed, bos)
    if ranks.first:
        warn_if_out_of_reach(loaded, target)
    return search_stage(loaded, problem, windows, options.how, options.out, ranks)


def search_stage(
    loaded: LoadedModel,
    problem: Problem,
    windows: Windows,
    how: SearchSettings,
    out: Path,
    ranks: Ranks,
    title: str = "search",
) -> SearchResult:
    """Any of the three searches, on windows of its length.

    Raises:
        ValueError: ``out`` holds another search, or no candidate has a finite loss.
    """
    facts = loaded.facts
    if how.algorithm == "fast" and loaded.model.dtype == torch.float16:
        raise ValueError(
            "--dtype float16: slopes are too small for it; give bfloat16 or --algorithm paper"
        )
    start, length = problem.space.start, problem.space.start.max_position_embeddings
    questions = passkey_questions(loaded.tokenizer, length, how.passkeys, how.seed)
    forward = loaded.forward(how.chunk, how.hidden_device)
    if how.algorithm == "fast":
        require_slope(forward, start, length)
    slope = slope_forwards(facts, length, forward.chunk) if how.algorithm == "fast" else math.nan
    headline = _headline(facts, start, windows, questions)
    with progress(title, how.forwards, show=ranks.first) as advance:
        result = search(
            _config(loaded, problem, windows, questions, how, forward.chunk),
            problem,
            Objective(forward, windows.ids, questions),
            out,
            price=Price(len(windows.ids), slope),
            ranks=ranks,
            budget=how.budget,
            patience=how.patience,
            provenance={
                "model": facts.name,
                "base_factors": list(facts.base_factors),
                "document_names": [document.name for document in windows.documents],
                "longrope": longrope.__version__,
                "python": platform.python_version(),
            },
            report=_Reporter(headline, advance) if ranks.first else lambda now: None,
        )
        advance(how.forwards, f"best {result.best_loss:.4f}")
        return result


def _headline(
    facts: ModelFacts, start: Rescale, windows: Windows, questions: Sequence[Prompt]
) -> str:
    original, length = start.original_max_position_embeddings, start.max_position_embeddings
    names = ", ".join(document.name for document in windows.documents)
    asked = f", {len(questions)} pass keys" if questions else ""
    return (
        f"{facts.architecture}, {original:,} → {length:,} tokens ({start.scale:g}×); "
        f"{len(windows.ids)} windows of {names}{asked}"
    )


def _config(
    loaded: LoadedModel,
    problem: Problem,
    windows: Windows,
    questions: Sequence[Prompt],
    how: SearchSettings,
    chunk: int,
) -> SearchConfig:
    """Which search this is: another one does not go on in its directory."""
    start = problem.space.start
    seen = b"".join(ids.tobytes() for ids in (windows.ids, *(q.ids for q in questions)))
    return SearchConfig(
        model=loaded.fingerprint(),
        documents=tuple(h for document in windows.documents for h in document.sha256),
        windows=hashlib.sha256(seen).hexdigest(),
        passkeys=how.passkeys,
        length=start.max_position_embeddings,
        algorithm=how.algorithm,
        settings=how.of_algorithm(),
        seed=how.seed,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        device=loaded.model.device.type,
        chunk=chunk,
        start={k: v for k, v in start.to_json().items() if k != "provenance"},
        upper=problem.space.upper,
        start_tokens=problem.space.start_tokens,
    )


# Starts that a progress line has room for.
_SHOWN = 3


class _Reporter:
    """Say how a search goes: what it is, how long it will take, then the best so far."""

    def __init__(self, headline: str, advance: Advance):
        self.headline, self.advance = headline, advance
        self.estimated = False

    def __call__(self, now: Progress) -> None:
        if now.evaluations == 0:
            console.print(self.headline, highlight=False)
            return
        if not self.estimated and now.seconds_left is not None:
            self.estimated = True
            console.print(
                f"{now.total - now.forwards:.0f} forwards of all windows to go, about "
                f"{duration(now.seconds_left)}; it can be stopped and run again at any time",
                highlight=False,
            )
        if now.replayed and now.forwards < now.total:
            return
        finite = [(loss, name) for name, loss in now.starts.items() if math.isfinite(loss)]
        starts = " ".join(f"{name} {loss:.4f}" for loss, name in sorted(finite)[:_SHOWN])
        left = "" if now.seconds_left is None else f", {duration(now.seconds_left)} left"
        self.advance(int(now.forwards), f"best {now.best:.4f} ({starts}){left}")
