"""Run a search algorithm over the evaluator, and return what it found.

Every loss is a synced line of ``history.jsonl``, and an algorithm is a function of its seed and
those losses, so a search resumes by replaying. Every rank runs the same algorithm; only results are
communicated.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longrope.distributed import Ranks
from longrope.files import only_process
from longrope.rope.rescale import Rescale
from longrope.search.evaluator import BudgetSpent, Evaluator, Progress, SearchResult
from longrope.search.evolution import evolution_search
from longrope.search.gradient_search import Schedule, gradient_search
from longrope.search.history import SearchIdentity
from longrope.search.problem import Problem
from longrope.search.settings import EvolutionSearchConfig
from longrope.search.space import EvaluationCost, Result


def search(
    identity: SearchIdentity,
    problem: Problem,
    loss: Callable[[Rescale, int | None, bool], Result],
    out: Path,
    *,
    cost: EvaluationCost | None = None,
    ranks: Ranks | None = None,
    provenance: dict[str, Any] | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    show: Callable[[Schedule], None] = lambda schedule: None,
) -> SearchResult:
    """Run a search, or resume the one in ``out``.

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
