"""Run or resume a search: load its windows, call the algorithm, and write the factors.

Every loss is a synced line of ``history.jsonl``, and an algorithm is a function of its seed and
those losses, so a search resumes by replaying. Every rank runs the same algorithm; only results are
communicated.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import math
import platform
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longrope.data.documents import check_sources
from longrope.data.encoding import bos_tokens
from longrope.data.kinds import windows_of_kinds
from longrope.data.prompts import Prompt
from longrope.data.windows import (
    TokenDocument,
    Windows,
    check_documents,
    load_documents,
    pack,
    random_half,
    search_windows,
)
from longrope.distributed import Ranks
from longrope.files.atomic import require_directory
from longrope.files.lock import only_process
from longrope.files.stores import JsonlStore
from longrope.layerwise.backward import check_gradient_support
from longrope.layerwise.forward import LongForward
from longrope.models.compatibility import warn_if_out_of_reach
from longrope.models.info import ModelInfo
from longrope.models.load import LoadedModel
from longrope.models.target_length import parse_extension
from longrope.progress import Advance, console, progress
from longrope.rope.apply import rescaled
from longrope.rope.rescale import Rescale
from longrope.search.cost import EvaluationCost, gradient_cost
from longrope.search.evaluator import BudgetSpent, Evaluator, SearchProgress, SearchResult
from longrope.search.evolution import evolution_search
from longrope.search.gradient_search import Schedule, gradient_search
from longrope.search.history import SearchIdentity, require_search_directory
from longrope.search.objective import Objective, passkey_questions, window_losses
from longrope.search.problem import Problem, first_search_problem, require_start_tokens
from longrope.search.settings import EvolutionSearchConfig, GradientSearchConfig
from longrope.search.space import START_TOKENS, Result
from longrope.search.validation import OWN, Validation, rescale_key, validate
from longrope.units import duration
from longrope.version import __version__


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """Options of one search run from the unscaled model: target, data, directory, settings.

    Raises:
        ValueError: a value out of range.
    """

    target: str
    out: Path
    data: tuple[str, ...] = ()
    field: str = "text"
    pack: bool = False
    attention_factor: float | None = None
    start_tokens: int | None = None
    seed: int = 0
    config: GradientSearchConfig | EvolutionSearchConfig = dataclasses.field(
        default_factory=GradientSearchConfig
    )

    def __post_init__(self) -> None:
        factor = self.attention_factor
        if factor is not None and not 0 < factor < math.inf:
            raise ValueError(f"attention_factor is {factor}; it must be positive and finite")
        if self.start_tokens is not None and self.start_tokens < 0:
            raise ValueError(f"start_tokens is {self.start_tokens}; it must not be negative")

    def check(self, info: ModelInfo) -> None:
        """Check the options of a search run against a model, before its weights are read.

        Raises:
            ValueError: a target that is no extension, data that is not there, or an ``out`` that
                holds something else.
        """
        parse_extension(self.target, info)
        require_start_tokens(self.start_tokens or 0, info)
        check_sources(self.data)
        require_directory(self.out)
        require_search_directory(self.out)


def run_search(loaded: LoadedModel, options: SearchOptions, ranks: Ranks) -> SearchResult:
    """Run the search of the rescale factors for a target length, or resume it.

    Writes ``rescale.json`` (the best), ``portable.json`` (the best that engines can load, n̂ = 0),
    ``history.jsonl`` (every evaluation) and ``state.json`` to ``options.out``.

    Raises:
        ValueError: an option out of range, too few tokens, or a directory that holds
            another search; before any long work.
    """
    documents = load_documents(loaded.tokenizer, options.data, options.field)
    return search_documents(loaded, documents, options, ranks)


def search_documents(
    loaded: LoadedModel, documents: Sequence[TokenDocument], options: SearchOptions, ranks: Ranks
) -> SearchResult:
    """Search as :func:`run_search`, on tokenized documents in place of the options' data."""
    target = parse_extension(options.target, loaded.info)
    problem = first_search_problem(
        loaded.info,
        target,
        attention_factor=options.attention_factor,
        start_tokens=START_TOKENS if options.start_tokens is None else (options.start_tokens,),
        max_factor=options.config.max_factor,
    )
    bos, seed = bos_tokens(loaded.tokenizer), options.seed
    check_documents(documents, loaded.info.vocabulary, bos)
    if options.pack:
        documents = random_half(documents, random.Random(seed))
        documents = [pack(documents, bos, loaded.tokenizer.eos_token_id)]
    windows = search_windows(
        documents,
        target,
        options.config.windows,
        seed,
        bos,
        validation=options.config.own_validation_windows,
    )
    if ranks.first:
        warn_if_out_of_reach(loaded.model, loaded.info, target)
    return search_stage(
        loaded,
        problem,
        windows,
        options.config,
        options.out,
        ranks,
        seed=options.seed,
    )


def search_stage(
    loaded: LoadedModel,
    problem: Problem,
    windows: Windows,
    config: GradientSearchConfig | EvolutionSearchConfig,
    out: Path,
    ranks: Ranks,
    *,
    seed: int = 0,
    title: str = "search",
) -> SearchResult:
    """Run or resume any of the three searches on its windows, and show its progress.

    Raises:
        ValueError: ``out`` holds another search, or no candidate has a finite loss.
    """
    info = loaded.info
    if config.algorithm == "gradient" and loaded.model.dtype == torch.float16:
        raise ValueError(
            "dtype is float16, too small for gradients; use bfloat16, or algorithm evolution"
        )
    start, length = problem.space.start, problem.space.start.max_position_embeddings
    questions = passkey_questions(loaded.tokenizer, length, config.passkey_prompts, seed)
    forward = loaded.forward()
    if config.algorithm == "gradient":
        check_gradient_support(forward, start, length)
    grad = (
        gradient_cost(info, length, forward.chunk_size)
        if config.algorithm == "gradient"
        else math.nan
    )
    chosen = _choose_windows(loaded, windows, config, length, seed)
    headline = _headline(info, start, windows, chosen, questions)
    tokens = sum(map(len, chosen.searched))
    cost = EvaluationCost(
        len(chosen.searched), grad, tuple(len(ids) / tokens for ids in chosen.searched)
    )
    with progress(title, config.forwards, show=ranks.first) as advance:
        result = run_algorithm(
            _identity(loaded, problem, windows, chosen, questions, config, seed),
            problem,
            Objective(forward, chosen.searched, questions),
            out,
            cost=cost,
            ranks=ranks,
            provenance={
                "model": info.name,
                "document_names": [document.name for document in windows.documents],
                "longrope": __version__,
                "python": platform.python_version(),
            },
            report=_Reporter(headline, chosen.validation_cost, advance)
            if ranks.first
            else lambda now: None,
            show=_schedule_printer() if ranks.first else lambda schedule: None,
        )
        advance(config.forwards, f"best {result.best_loss:.4f}")
    passes = result.forwards * (len(chosen.searched) + len(questions))
    result = dataclasses.replace(result, window_passes=passes)
    return _validated(result, problem, chosen, forward, out, ranks)


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """The windows of a search, of the given text and of other kinds, and those for validation.

    Attributes:
        searched: token ids of each search window; text and other kinds in turn.
        unseen: token ids of each validation window.
        kinds: of the validation windows.
    """

    searched: list[np.ndarray]
    unseen: list[np.ndarray]
    kinds: list[str]

    @property
    def validation_cost(self) -> float:
        """Cost of a usual validation, in forward passes over all search windows."""
        return _USUAL * sum(map(len, self.unseen)) / sum(map(len, self.searched))


def _choose_windows(
    loaded: LoadedModel,
    windows: Windows,
    config: GradientSearchConfig | EvolutionSearchConfig,
    length: int,
    seed: int,
) -> _Chosen:
    """Return the search and validation windows, with other kinds of text as configured."""
    if config.transfer == "none":
        return _Chosen(list(windows.ids), [], [])
    original = loaded.info.original_max_position_embeddings or 0
    searched, validated = windows_of_kinds(
        loaded.tokenizer, length, original, seed, bos_tokens(loaded.tokenizer)
    )
    if config.transfer == "validate":
        searched = {}
    pairs = itertools.zip_longest(windows.ids, searched.values())
    unseen = [(OWN, ids) for ids in windows.validation]
    unseen += [(kind, ids) for kind, rows in validated.items() for ids in rows]
    return _Chosen(
        [ids for pair in pairs for ids in pair if ids is not None],
        [ids for _, ids in unseen],
        [kind for kind, _ in unseen],
    )


def _validated(
    result: SearchResult,
    problem: Problem,
    chosen: _Chosen,
    forward: LongForward,
    out: Path,
    ranks: Ranks,
) -> SearchResult:
    """Validate a search's result and its portable one, and write the factors that are accepted.

    Losses are kept in ``validation.jsonl``, so that an interrupted validation resumes.
    """
    if not chosen.unseen or result.start is None or result.best_start is None:
        return result
    store = JsonlStore(out / "validation.jsonl") if ranks.first else {}
    start, count = (result.best_start[0], result.start), ranks.group_count
    forms = sorted(problem.published, key=lambda name: result.starts.get(name, math.inf))
    measured: set[str] = set()
    if store:
        console.print(f"resuming after {len(store)} validated candidates")

    def measure(rescale: Rescale) -> list[float]:
        key = rescale_key(rescale)
        found = ranks.broadcast(store.get(key) if ranks.first else None)
        if found is None:
            found = [math.nan] * len(chosen.unseen)
            with rescaled(forward.model, rescale):
                for index in range(ranks.group_index, len(found), count):
                    (found[index],) = window_losses(forward, [chosen.unseen[index]])
                    windows_done = len(measured) * len(found) + index + 1
                    advance(windows_done, f"windows, {len(measured)} candidates done")
            rows = ranks.gather_rows(found)[:: ranks.group.size]
            found = [rows[index % count][index] for index in range(len(found))]
            if ranks.first:
                store[key] = found
        measured.add(key)
        return found

    def accepted(found: Rescale) -> tuple[Rescale, Validation]:
        published = {name: problem.published[name] for name in forms}
        rescale, validation = validate(measure, chosen.kinds, found, start, published)
        kept = dict(found.provenance)
        if validation.chosen != "result":
            del kept["loss"]  # which these factors do not have
            kept["chosen"] = validation.chosen
        kept["validated"] = validation.summary()
        return rescale.replace(searched_documents=found.searched_documents, provenance=kept), (
            validation
        )

    with (
        only_process(out) if ranks.first else contextlib.nullcontext(),
        progress("validate", _MOST * len(chosen.unseen), show=ranks.first) as advance,
    ):
        best, validation = accepted(result.best)
        portable = result.portable
        if portable is not None:
            portable = best if best.portable else accepted(portable)[0]
        advance(_MOST * len(chosen.unseen), f"chosen: {validation.chosen}")
        if ranks.first:
            best.save(out / "rescale.json")
            if portable is not None:
                portable.save(out / "portable.json")
    return dataclasses.replace(
        result,
        best=best,
        portable=portable,
        window_passes=result.window_passes + len(measured) * len(chosen.unseen),
        gain=validation.gain,
        gain_standard_error=validation.gain_standard_error,
        validation=validation,
    )


def describe_gain(result: SearchResult) -> str:
    """Return a search result in words: best start, result and gain, on the same windows."""
    if result.validation is not None:
        return _describe_validation(result.validation)
    if result.best_start is None or result.gain is None:
        return f"Result: {result.best_loss:.4f} nats per token."
    name, loss = result.best_start
    if result.gain <= 0:
        return (
            f"No candidate beats the best start, {name} ({loss:.4f} nats per token): the result is "
            "this start."
        )
    error = result.gain_standard_error
    uncertain = "one window gives no standard error" if error is None else f"± {error:.4f}"
    return (
        f"Best start: {name}, {loss:.4f} nats per token. Result: {result.best_loss:.4f}. Gain: "
        f"{result.gain:.4f} ({uncertain}; perplexity {math.expm1(-result.gain):+.1%}), on the same "
        "windows."
    )


def _describe_validation(found: Validation) -> str:
    """Return a search's validation in words: what was chosen, and its gain on unseen windows."""
    own = sum(kind == OWN for kind in found.kinds)
    where = f"{own} unseen windows of this text and {len(found.kinds) - own} of other kinds"
    if found.chosen == found.start or not found.gain:
        return (
            f"Validated on {where}: nothing beats {found.start} there without harm to a kind of "
            f"text, so the result is {found.start}."
        )
    error = found.gain_standard_error
    uncertain = "" if error is None else f" ± {error:.4f}"
    each = ", ".join(
        f"{'this text' if kind == OWN else kind} {math.expm1(-gain):+.1%}"
        for kind, gain in found.gains.items()
    )
    result = "the result" if found.chosen == "result" else f"the result ({found.chosen})"
    return (
        f"Validated on {where}: {result} gains {found.gain:.4f}{uncertain} nats per token over "
        f"{found.start}. Perplexity: {each}."
    )


def _schedule_printer() -> Callable[[Schedule], None]:
    """Return a function that prints the schedule of a search, and then what became of it."""
    shown: list[Schedule] = []

    def show(schedule: Schedule) -> None:
        text = str(schedule)
        if shown:  # unused trials became steps
            text = (
                f"schedule after the ramp trials: {schedule.steps} steps, the last "
                f"{schedule.averaged_steps} averaged"
            )
        shown.append(schedule)
        console.print(text)

    return show


def _headline(
    info: ModelInfo,
    start: Rescale,
    windows: Windows,
    chosen: _Chosen,
    questions: Sequence[Prompt],
) -> str:
    original, length = start.original_max_position_embeddings, start.max_position_embeddings
    names = ", ".join(document.name for document in windows.documents)
    count = len(windows.ids)
    others = len(chosen.searched) - count
    unseen = f" and {len(windows.validation)} for validation" if chosen.unseen else ""
    asked = f"; {others} windows of other kinds of text" if others else ""
    asked += f", {len(questions)} passkey prompts" if questions else ""
    return (
        f"{info.architecture}, {original:,} → {length:,} tokens ({start.scale:g}×); "
        f"{count} window{'s' * (count != 1)}{unseen}, of {names}{asked}"
    )


def run_algorithm(
    identity: SearchIdentity,
    problem: Problem,
    loss: Callable[[Rescale, int | None, bool], Result],
    out: Path,
    *,
    cost: EvaluationCost | None = None,
    ranks: Ranks | None = None,
    provenance: dict[str, Any] | None = None,
    report: Callable[[SearchProgress], None] = lambda progress: None,
    show: Callable[[Schedule], None] = lambda schedule: None,
) -> SearchResult:
    """Run a search with the configured algorithm, or resume the one in ``out``.

    Args:
        problem: the search space and its starts.
        loss: returns the result of a rescale, on one window or all, with or without gradient.
        cost: of requests.
        show: is called with the schedule of a gradient search.

    Raises:
        ValueError: ``out`` holds another search (the differing fields are named) or a
            damaged state; no candidate has a finite loss; a file cannot be written.
        RankLost: another process of the run died.
    """
    ranks, cost, config = ranks or Ranks(), cost or EvaluationCost(), identity.config
    with only_process(out) if ranks.first else contextlib.nullcontext():
        evaluate = Evaluator(
            identity, problem.space, loss, out, cost, ranks, report, provenance or {}
        )
        with contextlib.suppress(BudgetSpent):
            if isinstance(config, EvolutionSearchConfig):
                evolution_search(evaluate, problem, config, identity.seed)
            else:
                gradient_search(evaluate, problem, config, identity.seed, cost, show)
        return evaluate.result()


def _identity(
    loaded: LoadedModel,
    problem: Problem,
    windows: Windows,
    chosen: _Chosen,
    questions: Sequence[Prompt],
    config: GradientSearchConfig | EvolutionSearchConfig,
    seed: int,
) -> SearchIdentity:
    start = problem.space.start
    used = (*chosen.searched, *chosen.unseen, *(question.ids for question in questions))
    seen = b"".join(ids.tobytes() for ids in used)
    return SearchIdentity(
        model=loaded.fingerprint(),
        documents=tuple(h for document in windows.documents for h in document.sha256),
        tokens=hashlib.sha256(seen).hexdigest(),
        length=start.max_position_embeddings,
        config=config,
        seed=seed,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        device=loaded.model.device.type,
        chunk_size=loaded.forward().chunk_size,
        start=start.applied(),
        bound=problem.space.max_factor,
        start_tokens=problem.space.start_tokens,
    )


# Candidates that a validation measures: usually the result, the start and two published methods;
# at most also the portable result, and two between each result and a method.
_USUAL, _MOST = 4, 9
# Number of starts in a progress line.
_SHOWN = 3


class _Reporter:
    """Reporter of a search run: its headline, the estimated time, then the best loss so far.

    ``validation`` is the cost of the validation that follows, in forward passes over all windows.
    """

    def __init__(self, headline: str, validation: float, advance: Advance):
        self.headline, self.validation, self.advance = headline, validation, advance
        self.estimated, self.replayed = False, 0

    def __call__(self, now: SearchProgress) -> None:
        if now.evaluations == 0:
            console.print(self.headline)
            return
        if now.replayed:
            self.replayed = now.evaluations
        elif self.replayed:
            console.print(f"resuming after {self.replayed} evaluations")
            self.replayed = 0
        left, seconds = now.total - now.forwards, now.seconds_left
        if seconds is not None and self.validation:  # after the last pass the rate is not known
            seconds = seconds * (1 + self.validation / left) if left > 0 else None
        if not self.estimated and seconds is not None:
            self.estimated = True
            then = " with the validation" if self.validation else ""
            console.print(
                f"{left:.0f} forward passes over all windows left, about {duration(seconds)}{then};"
                " it can be stopped and resumed at any time",
            )
        if now.replayed and now.forwards < now.total:
            return
        if now.best_start is None:
            finite = [(loss, name) for name, loss in now.starts.items() if math.isfinite(loss)]
            starts = " ".join(f"{name} {loss:.4f}" for loss, name in sorted(finite)[:_SHOWN])
            text = f"comparing starts: {starts}"
        else:
            name, loss = now.best_start
            text = f"best {now.best:.4f} nats/token (start: {name} {loss:.4f})"
        self.advance(
            int(now.forwards), text if seconds is None else f"{text}, {duration(seconds)} left"
        )
