"""The memoised evaluator of a search: replays its history and shares requests among ranks."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longrope.distributed import Ranks
from longrope.files.parse import content_of
from longrope.files.stores import append_line
from longrope.progress import seconds_left
from longrope.rope.rescale import Rescale
from longrope.search.cost import EvaluationCost
from longrope.search.history import Record, SearchIdentity
from longrope.search.space import Candidate, Request, Result, Space
from longrope.search.validation import Validation


@dataclasses.dataclass
class SearchProgress:
    """Progress that a search evaluator reports at its start and after every evaluation.

    ``forwards`` of ``total`` forward passes over all windows are done.
    """

    evaluations: int
    forwards: float
    total: int
    generation: int
    loss: float
    best: float
    starts: dict[str, float]  # loss of each named start, as far as known
    best_start: tuple[str, float] | None  # the best of those evaluated on all windows
    seconds_left: float | None
    replayed: bool


@dataclasses.dataclass
class SearchResult:
    """Result of a search evaluator: the best factors, the best portable ones, and the cost."""

    best: Rescale
    best_loss: float
    portable: Rescale | None  # None where start tokens are fixed above 0
    portable_loss: float | None
    starts: dict[str, float]  # of those with a finite loss
    best_start: tuple[str, float] | None  # name and loss, on all windows as best_loss
    start: Rescale | None  # the best start
    gain: float | None  # loss of the best start minus best_loss, or the validated gain
    gain_standard_error: float | None  # paired over the windows; None for one window
    evaluations: int
    forwards: float  # over all windows
    window_passes: float  # over single windows or prompts, those of a validation included
    computed: int  # evaluations of this run, not read from the history
    not_finite: int
    validation: Validation | None = None


class BudgetSpent(Exception):
    """Raised by the search evaluator when the budget or the patience is spent."""


class Evaluator:
    """Search evaluator: replays the history, computes new requests, and stops at the budget.

    Args:
        loss: returns the result of a rescale, on one window or all, with or without gradient.
        out: directory of the search.
        provenance: entries to write into the rescale files.

    Raises:
        ValueError: ``out`` holds another search, or the processes run different searches.
    """

    def __init__(
        self,
        identity: SearchIdentity,
        space: Space,
        loss: Callable[[Rescale, int | None, bool], Result],
        out: Path,
        cost: EvaluationCost,
        ranks: Ranks,
        report: Callable[[SearchProgress], None],
        provenance: dict[str, Any],
    ):
        self.identity, self.space, self.cost, self.loss = identity, space, cost, loss
        self.out, self.ranks, self.report, self.provenance = out, ranks, report, provenance
        self.starts: dict[str, Candidate] = {}
        self.results: dict[Request, Result] = {}
        self.forwards = 0.0
        self.computed = 0
        self.generation = 0
        self._without_gain = 0
        self._measured: list[tuple[float, float]] = []  # (cost, seconds) of computed requests
        # Only rank 0 touches the disk, because nodes may not share one. All ranks raise its errors.
        self.record = Record(out, identity)
        found = ranks.broadcast(self._open() if ranks.first else None)
        if "error" in found:
            raise ValueError(found["error"])
        self.history: list[dict[str, Any]] = found["history"]
        same = float(ranks.broadcast(identity.sha256) == identity.sha256)
        if not all(ranks.gather(same)):
            raise ValueError(
                "the processes of this run do not search the same: model, documents, library and "
                "options must be equal on every node"
            )
        # A budget below the cost of the history does not discard results.
        with content_of(out / "history.jsonl", "give another `out`, or delete the directory"):
            known = math.ceil(sum(float(line["forwards"]) for line in self.history))
        self.total = min(max(identity.config.forwards, known), identity.config.max_forwards)
        self._report(math.nan, replayed=False)

    def __call__(
        self, requests: Sequence[Request], starts: dict[str, Candidate] | None = None, /
    ) -> list[Result]:
        """Evaluate one generation of search requests; those already evaluated cost nothing.

        Args:
            starts: names of candidates, for reports.

        Raises:
            BudgetSpent: the budget does not cover all requests, or the patience is spent.
            ValueError: the history on disk holds other requests.
        """
        self.starts |= starts or {}
        affordable = self._affordable(requests) if self.forwards < self.total else []
        if not affordable:
            raise BudgetSpent
        best_before = self.best_loss()
        self._evaluate(affordable)
        self.generation += 1
        self._without_gain = 0 if self.best_loss() < best_before else self._without_gain + 1
        if len(self.results) >= len(self.history):  # else the replay continues
            if self.ranks.first:
                self.record.save_state(len(self.results), self.generation)
                self._save_bests()
            patience = getattr(self.identity.config, "patience", None)
            if patience is not None and self._without_gain >= patience:
                raise BudgetSpent
        if len(affordable) < len(requests):
            raise BudgetSpent
        return [self.results[request] for request in requests]

    def _open(self) -> dict[str, Any]:
        try:
            return {"history": self.record.open()}
        except ValueError as error:
            return {"error": str(error)}

    def _affordable(self, requests: Sequence[Request]) -> list[Request]:
        """Return the first requests that the evaluator's remaining budget covers."""
        left, chosen = self.total - self.forwards + 1e-9, []
        for request in requests:
            left -= 0 if request in self.results else self.cost.of(request)
            if left < 0:
                break
            chosen.append(request)
        return chosen

    def _evaluate(self, requests: Sequence[Request]) -> None:
        """Replay search requests from the history, then compute one per sequence-parallel group."""
        fresh = [request for request in requests if request not in self.results]
        while fresh and len(self.results) < len(self.history):
            self._replay(fresh.pop(0))
        for first in range(0, len(fresh), self.ranks.group_count):
            share = fresh[first : first + self.ranks.group_count]
            started = time.monotonic()
            for request, result in zip(share, self._compute(share), strict=True):
                seconds = (time.monotonic() - started) / len(share)
                self._measured.append((self.cost.of(request), seconds))
                self._record(request, result)

    def _compute(self, share: Sequence[Request]) -> list[Result]:
        """Evaluate one search request per sequence-parallel group; every rank gets all results."""
        result = Result(math.nan)
        if self.ranks.group_index < len(share):
            own = share[self.ranks.group_index]
            result = self.loss(self.space.rescale(own.candidate), own.window, own.grad)
        more = result.grad or result.window_losses
        width = max(self.space.dimensions, self.cost.windows)
        row = [result.loss, *more, *(math.nan,) * (width - len(more))]
        rows = self.ranks.gather_rows(row)[:: self.ranks.group.size]
        return [self._result(request, row) for request, row in zip(share, rows, strict=False)]

    def _result(self, request: Request, row: Sequence[float]) -> Result:
        """Return the result of a request from the numbers that its rank sent."""
        if request.grad:
            return Result(row[0], tuple(row[1 : 1 + self.space.dimensions]))
        each = tuple(row[1 : 1 + self.cost.windows]) if request.window is None else ()
        return Result(row[0], window_losses=each if all(map(math.isfinite, each)) else ())

    def _line(self, request: Request) -> dict[str, Any]:
        """Return the line that the evaluator adds to the history for a request, without result."""
        rescale = self.space.rescale(request.candidate)
        line: dict[str, Any] = {
            "evaluation": len(self.results),
            "factors": list(rescale.factors),
            "start_tokens": rescale.start_tokens,
            "attention_factor": rescale.attention_factor,
            "forwards": self.cost.of(request),
        }
        return line | ({} if request.window is None else {"window": request.window})

    def _replay(self, request: Request) -> None:
        number = len(self.results)
        line = self.history[number]
        loss, grad = line.get("loss", "none"), line.get("grad", [])
        fits = loss is None or isinstance(loss, float)
        fits &= len(grad) == (self.space.dimensions if request.grad else 0)
        expected = self._line(request)
        fits &= {name: line.get(name) for name in expected} == expected
        if not fits or line.get("window") != request.window:
            raise ValueError(
                f"{self.record.history} is damaged at evaluation {number}, or of another version: "
                f"this search requests something else; delete {self.out} to start over"
            )
        found = Result(
            math.nan if loss is None else loss,
            tuple(math.nan if number is None else number for number in grad),
            tuple(line.get("window_losses", ())),
        )
        self._keep(request, found, replayed=True)

    def _record(self, request: Request, result: Result) -> None:
        if self.ranks.first:
            plain = request.window is None and not request.grad
            names = (n for n, start in self.starts.items() if plain and start == request.candidate)
            line = self._line(request) | {
                "loss": result.loss if math.isfinite(result.loss) else None,
                "generation": self.generation,
                "start": next(names, None),
            }
            if request.grad:
                line["grad"] = [x if math.isfinite(x) else None for x in result.grad]
            if result.window_losses:
                line["window_losses"] = list(result.window_losses)
            append_line(self.record.history, line)
        self.computed += 1
        self._keep(request, result, replayed=False)

    def _keep(self, request: Request, result: Result, *, replayed: bool) -> None:
        self.results[request] = result
        self.forwards += self.cost.of(request)
        self._report(result.loss, replayed=replayed)

    def _report(self, loss: float, *, replayed: bool) -> None:
        self.report(
            SearchProgress(
                evaluations=len(self.results),
                forwards=self.forwards,
                total=self.total,
                generation=self.generation,
                loss=loss,
                best=self.best_loss(),
                starts=self.start_losses(),
                best_start=self.best_start(),
                seconds_left=seconds_left(self._measured, self.total - self.forwards),
                replayed=replayed,
            )
        )

    def start_losses(self) -> dict[str, float]:
        """Return the evaluated loss of each start: on all search windows, or on those compared."""
        known: dict[str, dict[int | None, float]] = {}
        for name, candidate in self.starts.items():
            for window in (None, *range(self.cost.windows)):
                result = self.results.get(Request(candidate, window))
                if result is not None:
                    known.setdefault(name, {})[window] = result.loss
        # A start whose comparison is in progress may lack a window that the others have.
        shared = {w for losses in known.values() for w in losses if w is not None}
        shared = shared or {None}
        whole = {name: losses for name, losses in known.items() if shared <= losses.keys()}
        return {n: sum(losses[p] for p in shared) / len(shared) for n, losses in whole.items()}

    def best_start(self) -> tuple[str, float] | None:
        """Return the best start of those evaluated on all search windows, and its loss."""
        found = {
            name: result.loss
            for name, candidate in self.starts.items()
            if (result := self.results.get(Request(candidate))) and math.isfinite(result.loss)
        }
        name = min(found, key=found.__getitem__, default=None)
        return None if name is None else (name, found[name])

    def _gain(self, best: Request) -> tuple[float | None, float | None]:
        """Return the gain over the best start with its standard error, paired over the windows."""
        start = self.best_start()
        if start is None:
            return None, None
        before, after = self.results[Request(self.starts[start[0]])], self.results[best]
        pairs = list(zip(before.window_losses, after.window_losses, strict=False))
        error = None
        if len(pairs) > 1:
            differences = [a - b for a, b in pairs]
            error = statistics.stdev(differences) / math.sqrt(len(differences))
        return before.loss - after.loss, error

    def best(self, portable: bool) -> tuple[float, Request] | None:
        """Return the lowest loss evaluated on all search windows, and its request."""
        finite = [
            (round(result.loss, 6), number, request)
            for number, (request, result) in enumerate(self.results.items())
            if request.window is None
            and math.isfinite(result.loss)
            and not (portable and not request.candidate.portable)
        ]
        if not finite:
            return None
        _, _, request = min(finite, key=lambda entry: entry[:2])
        return self.results[request].loss, request

    def best_loss(self) -> float:
        """Return the lowest loss evaluated on all search windows, rounded; infinity if none."""
        found = self.best(portable=False)
        return math.inf if found is None else round(found[0], 6)

    def _save_bests(self) -> None:
        for name, portable in (("rescale.json", False), ("portable.json", True)):
            found = self.best(portable)
            if found is not None:
                self._with_provenance(found).save(self.out / name)

    def _with_provenance(self, found: tuple[float, Request]) -> Rescale:
        loss, request = found
        record = {
            "method": f"search ({self.identity.config.algorithm})",
            "loss": loss,
            "evaluations": len(self.results),
            "forwards": round(self.forwards, 2),
            "seed": self.identity.seed,
            "config_hash": self.identity.sha256,
        }
        return self.space.rescale(request.candidate).replace(
            searched_documents=self.identity.documents, provenance=record | self.provenance
        )

    def result(self) -> SearchResult:
        """Return the search result: the best factors evaluated so far, and the cost.

        Raises:
            ValueError: no candidate has a finite loss.
        """
        best, portable = self.best(False), self.best(True)
        if best is None:
            raise ValueError(
                f"none of {len(self.results)} candidates has a finite loss; look at the model's "
                "weights, or try --dtype float32"
            )
        gain, error = self._gain(best[1])
        start = self.best_start()
        return SearchResult(
            best=self._with_provenance(best),
            best_loss=best[0],
            portable=self._with_provenance(portable) if portable else None,
            portable_loss=portable[0] if portable else None,
            starts={n: loss for n, loss in self.start_losses().items() if math.isfinite(loss)},
            best_start=start,
            start=self.space.rescale(self.starts[start[0]]) if start else None,
            gain=gain,
            gain_standard_error=error,
            evaluations=len(self.results),
            forwards=round(self.forwards, 2),
            window_passes=self.forwards * self.cost.windows,
            computed=self.computed,
            not_finite=sum(not math.isfinite(found.loss) for found in self.results.values()),
        )
