"""The loop around a search: budget, history, resume, ranks, and what it leaves behind.

Nothing is lost and nothing is trusted: every loss is a synced line of
``history.jsonl``, the algorithm is a function of its seed and those losses, so
resuming is replaying. Every rank runs the same algorithm; only losses travel.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longrope.files import append_line, only_process
from longrope.parallel import Ranks
from longrope.rope.rescale import Rescale
from longrope.search.evolution import Evolution
from longrope.search.record import Record, SearchConfig
from longrope.search.space import Candidate, Space

ALGORITHMS = {"paper": Evolution}


@dataclasses.dataclass
class Progress:
    """Where a search stands; handed to ``report`` at its start and after every evaluation."""

    evaluations: int
    total: int
    generation: int
    loss: float
    best: float
    starts: dict[str, float]  # loss of each named start, as far as known
    seconds_left: float | None
    replayed: bool


@dataclasses.dataclass
class SearchResult:
    """The two bests, and what it took to find them."""

    best: Rescale
    best_loss: float
    portable: Rescale | None  # None where start tokens are fixed above 0
    portable_loss: float | None
    starts: dict[str, float]
    evaluations: int
    computed: int  # of which in this run, not read from the history
    not_finite: int


def search(
    config: SearchConfig,
    space: Space,
    starts: dict[str, Candidate],
    loss: Callable[[Rescale], float],
    out: Path,
    *,
    ranks: Ranks | None = None,
    budget: int | None = None,
    patience: int | None = None,
    provenance: dict[str, Any] | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> SearchResult:
    """Search, or go on with the search that ``out`` holds.

    Args:
        starts: the named candidates of the first population.
        budget: evaluations at most; by default what the algorithm's settings give.
        patience: stop after this many generations without a new best.

    Raises:
        ValueError: ``out`` holds another search (the differing fields are named) or a
            damaged state; no candidate has a finite loss; a file cannot be written.
        RankLost: another process of the run died.
    """
    ranks = ranks or Ranks()
    with only_process(out) if ranks.first else contextlib.nullcontext():
        run = _Run(config, space, starts, loss, out, ranks, report)
        return _loop(run, budget, patience, provenance or {})


def _loop(
    run: "_Run", budget: int | None, patience: int | None, provenance: dict[str, Any]
) -> SearchResult:
    config, known = run.config, len(run.history)
    # A smaller budget than what is known is no reason to forget any of it.
    run.total = min(max(budget or config.settings.evaluations, known), config.settings.evaluations)
    algorithm = ALGORITHMS[config.algorithm](
        run.space, list(run.starts.values()), config.settings, config.seed
    )
    run.report_start()
    since_best = 0
    while not algorithm.done and len(run.losses) < run.total:
        asked = algorithm.ask()[: run.total - len(run.losses)]
        if not asked:
            break
        best_before = run.best_loss()
        algorithm.tell(asked, run.evaluate(asked, algorithm.generation))
        since_best = 0 if run.best_loss() < best_before else since_best + 1
        if len(run.losses) < known:  # still replaying: what is on disk is further
            continue
        if run.ranks.first:
            run.record.save_state(len(run.losses), algorithm.generation, algorithm.random_state)
            run.save_bests(provenance)
        if patience is not None and since_best >= patience:
            break
    return run.result(provenance)


class _Run:
    """The evaluations of one search, known and new."""

    def __init__(
        self,
        config: SearchConfig,
        space: Space,
        starts: dict[str, Candidate],
        loss: Callable[[Rescale], float],
        out: Path,
        ranks: Ranks,
        report: Callable[[Progress], None],
    ):
        self.config, self.space, self.starts = config, space, starts
        self.loss, self.out, self.ranks, self.report = loss, out, ranks, report
        self.losses: dict[Candidate, float] = {}
        self.total = 0
        self.computed = 0
        self._seconds: list[float] = []
        # Rank 0 alone touches the disk: nodes need not share one. What it refuses, all do.
        self.record = Record(out, config)
        found = ranks.broadcast(self._open() if ranks.first else None)
        if "error" in found:
            raise ValueError(found["error"])
        self.history: list[dict[str, Any]] = found["history"]
        same = float(ranks.broadcast(config.sha256) == config.sha256)
        if not all(ranks.gather(same)):
            raise ValueError(
                "the processes of this run do not search the same: model, documents, library and "
                "options must be equal on every node"
            )

    def _open(self) -> dict[str, Any]:
        try:
            return {"history": self.record.open()}
        except ValueError as error:
            return {"error": str(error)}

    def evaluate(self, asked: Sequence[Candidate], generation: int) -> list[float]:
        """Losses of a generation: first what the history knows, then a candidate per rank."""
        for candidate in asked:
            if len(self.losses) >= len(self.history):
                break
            self._replay(candidate, generation)
        fresh = [candidate for candidate in asked if candidate not in self.losses]
        for first in range(0, len(fresh), self.ranks.size):
            share = fresh[first : first + self.ranks.size]
            started = time.monotonic()
            mine = share[self.ranks.rank] if self.ranks.rank < len(share) else None
            value = math.nan if mine is None else self.loss(self.space.rescale(mine))
            values = self.ranks.gather(value)[: len(share)]
            self._seconds.append((time.monotonic() - started) / len(share))
            for candidate, found in zip(share, values, strict=True):
                self._record(candidate, found, generation)
        return [self.losses[candidate] for candidate in asked]

    def _replay(self, candidate: Candidate, generation: int) -> None:
        number = len(self.losses)
        line = self.history[number]
        rescale = self.space.rescale(candidate)
        expected = (number, list(rescale.factors), rescale.start_tokens)
        found = (line.get("evaluation"), line.get("factors"), line.get("start_tokens"))
        loss = line.get("loss", "none")
        if found != expected or not (loss is None or isinstance(loss, float)):
            raise ValueError(
                f"{self.record.history} is damaged at evaluation {number}: it is not what this "
                f"search asked for; delete {self.out} to start over"
            )
        self.losses[candidate] = math.nan if loss is None else loss
        self._report(self.losses[candidate], generation, replayed=True)

    def _record(self, candidate: Candidate, loss: float, generation: int) -> None:
        rescale = self.space.rescale(candidate)
        if self.ranks.first:
            line = {
                "evaluation": len(self.losses),
                "loss": loss if math.isfinite(loss) else None,
                "factors": list(rescale.factors),
                "start_tokens": rescale.start_tokens,
                "attention_factor": rescale.attention_factor,
                "generation": generation,
                "start": next((n for n, c in self.starts.items() if c == candidate), None),
            }
            append_line(self.record.history, line)
        self.losses[candidate] = loss
        self.computed += 1
        self._report(loss, generation, replayed=False)

    def report_start(self) -> None:
        """Say that the search begins: nothing stands against it any more."""
        self._report(math.nan, 0, replayed=False)

    def _report(self, loss: float, generation: int, *, replayed: bool) -> None:
        left = None
        if self._seconds:
            recent = sorted(self._seconds[-15:])
            left = recent[len(recent) // 2] * (self.total - len(self.losses))
        self.report(
            Progress(
                evaluations=len(self.losses),
                total=self.total,
                generation=generation,
                loss=loss,
                best=self.best_loss(),
                starts=self.start_losses(),
                seconds_left=left,
                replayed=replayed,
            )
        )

    def start_losses(self) -> dict[str, float]:
        return {n: self.losses[c] for n, c in self.starts.items() if c in self.losses}

    def best(self, portable: bool) -> tuple[float, Candidate] | None:
        finite = [
            (round(loss, 6), number, candidate)
            for number, (candidate, loss) in enumerate(self.losses.items())
            if math.isfinite(loss) and not (portable and candidate.start_tokens)
        ]
        if not finite:
            return None
        _, _, candidate = min(finite)
        return self.losses[candidate], candidate

    def best_loss(self) -> float:
        found = self.best(portable=False)
        return math.inf if found is None else round(found[0], 6)

    def save_bests(self, provenance: dict[str, Any]) -> None:
        for name, portable in (("rescale.json", False), ("portable.json", True)):
            found = self.best(portable)
            if found is not None:
                self._with_provenance(found, provenance).save(self.out / name)

    def _with_provenance(self, found: tuple[float, Candidate], more: dict[str, Any]) -> Rescale:
        loss, candidate = found
        record = {
            "method": f"search ({self.config.algorithm})",
            "loss": loss,
            "evaluations": len(self.losses),
            "seed": self.config.seed,
            "documents": list(self.config.documents),
            "config_hash": self.config.sha256,
        }
        return self.space.rescale(candidate).replace(provenance=record | more)

    def result(self, provenance: dict[str, Any]) -> SearchResult:
        best, portable = self.best(False), self.best(True)
        if best is None:
            raise ValueError(
                f"none of {len(self.losses)} candidates has a finite loss; look at the model's "
                "weights, or try --dtype float32"
            )
        return SearchResult(
            best=self._with_provenance(best, provenance),
            best_loss=best[0],
            portable=self._with_provenance(portable, provenance) if portable else None,
            portable_loss=portable[0] if portable else None,
            starts=self.start_losses(),
            evaluations=len(self.losses),
            computed=self.computed,
            not_finite=sum(not math.isfinite(loss) for loss in self.losses.values()),
        )
