"""The loop around a search: budget, history, resume, ranks, and what it leaves behind.

Nothing is lost and nothing is trusted: every loss is a synced line of
``history.jsonl``, the algorithm is a function of its seed and those losses, so
resuming is replaying. Every rank runs the same algorithm; only losses travel.
"""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longrope.distributed import Ranks
from longrope.files import only_process
from longrope.rope.rescale import Rescale
from longrope.search.evaluator import Evaluations, Progress, SearchResult
from longrope.search.evolution import Evolution
from longrope.search.gradient_search import GradientSearch
from longrope.search.history import SearchIdentity
from longrope.search.problem import Problem
from longrope.search.settings import EvolutionSearchConfig
from longrope.search.space import Outcome, Price

_ALGORITHMS = {"gradient": GradientSearch, "evolution": Evolution}


def search(
    config: SearchIdentity,
    problem: Problem,
    loss: Callable[[Rescale, int | None, bool], Outcome],
    out: Path,
    *,
    price: Price | None = None,
    ranks: Ranks | None = None,
    provenance: dict[str, Any] | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> SearchResult:
    """Search, or go on with the search that ``out`` holds.

    Args:
        problem: the space, and where to begin in it.
        loss: of a rescale, on all windows or on one, with its slope or without.
        price: what trials cost.

    Raises:
        ValueError: ``out`` holds another search (the differing fields are named) or a
            damaged state; no candidate has a finite loss; a file cannot be written.
        RankLost: another process of the run died.
    """
    ranks = ranks or Ranks()
    with only_process(out) if ranks.first else contextlib.nullcontext():
        price = price or Price()
        algorithm = _ALGORITHMS[config.config.algorithm](
            problem,
            config.config,  # pyright: ignore[reportArgumentType]
            config.seed,
            price,
        )
        # The algorithm names more starts as it goes.
        run = Evaluations(config, problem.space, algorithm.starts, loss, out, price, ranks, report)
        return _loop(run, algorithm, provenance or {})


def _loop(
    run: Evaluations,
    algorithm: GradientSearch | Evolution,
    provenance: dict[str, Any],
) -> SearchResult:
    config, known = run.config.config, len(run.history)
    patience = config.patience if isinstance(config, EvolutionSearchConfig) else None
    # A smaller budget than what is known is no reason to forget any of it.
    run.total = min(max(config.forwards, math.ceil(run.known_forwards())), config.max_forwards)
    run.report_start()
    since_best = 0
    while not algorithm.done and run.forwards < run.total:
        asked = run.within_budget(algorithm.ask())
        if not asked:
            break
        best_before = run.best_loss()
        algorithm.tell(asked, run.evaluate(asked, algorithm.generation))
        since_best = 0 if run.best_loss() < best_before else since_best + 1
        if len(run.outcomes) < known:  # still replaying: what is on disk is further
            continue
        if run.ranks.first:
            run.record.save_state(len(run.outcomes), algorithm.generation)
            run.save_bests(provenance)
        if patience is not None and since_best >= patience:
            break
    return run.result(provenance)
