"""The evaluations of one search: known from its history, or computed, a request per group of ranks."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longrope.distributed import Ranks
from longrope.files import append_line
from longrope.rope.rescale import Rescale
from longrope.search.history import Record, SearchIdentity
from longrope.search.space import Candidate, Outcome, Price, Space, Trial


@dataclasses.dataclass
class Progress:
    """Where a search stands; handed to ``report`` at its start and after every evaluation.

    ``forwards`` of ``total`` forward equivalents are done: all windows once are one.
    """

    evaluations: int
    forwards: float
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
    starts: dict[str, float]  # of those with a finite loss
    evaluations: int
    forwards: float  # forward equivalents: all windows once are one
    computed: int  # of which in this run, not read from the history
    not_finite: int


class Evaluations:
    """The evaluations of one search, known and new."""

    def __init__(
        self,
        config: SearchIdentity,
        space: Space,
        starts: dict[str, Candidate],
        loss: Callable[[Rescale, int | None, bool], Outcome],
        out: Path,
        price: Price,
        ranks: Ranks,
        report: Callable[[Progress], None],
    ):
        self.config, self.space, self.starts = config, space, starts
        self.loss, self.out, self.ranks, self.report = loss, out, ranks, report
        self.price = price
        self.outcomes: dict[Trial, Outcome] = {}
        self.forwards = 0.0
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

    def known_forwards(self) -> float:
        """Forward equivalents of what the history holds."""
        return sum(float(line.get("forwards", 1.0)) for line in self.history)

    def within_budget(self, trials: Sequence[Trial]) -> list[Trial]:
        """As many of the trials as the budget still pays for."""
        left, chosen = self.total - self.forwards + 1e-9, []
        for trial in trials:
            left -= 0 if trial in self.outcomes else self.price.of(trial)
            if left < 0:
                break
            chosen.append(trial)
        return chosen

    def evaluate(self, asked: Sequence[Trial], generation: int) -> list[Outcome]:
        """Outcomes of a generation: first what the history knows, then a trial per team."""
        fresh = [trial for trial in asked if trial not in self.outcomes]
        while fresh and len(self.outcomes) < len(self.history):
            self._replay(fresh.pop(0), generation)
        for first in range(0, len(fresh), self.ranks.group_count):
            share = fresh[first : first + self.ranks.group_count]
            started = time.monotonic()
            for trial, outcome in zip(share, self._compute(share), strict=True):
                seconds = (time.monotonic() - started) / len(share)
                self._seconds.append(seconds / self.price.of(trial))
                self._record(trial, outcome, generation)
        return [self.outcomes[trial] for trial in asked]

    def _compute(self, share: Sequence[Trial]) -> list[Outcome]:
        """One trial a team; the numbers of all of them, on every rank."""
        outcome = Outcome(math.nan)
        if self.ranks.group_index < len(share):
            mine = share[self.ranks.group_index]
            outcome = self.loss(self.space.rescale(mine.candidate), mine.part, mine.slope)
        numbers = self.space.dimensions if any(trial.slope for trial in share) else 0
        slope = outcome.slope or (math.nan,) * numbers
        rows = self.ranks.gather_rows([outcome.loss, *slope])[:: self.ranks.group.size]
        return [
            Outcome(row[0], tuple(row[1:]) if trial.slope else ())
            for trial, row in zip(share, rows, strict=False)
        ]

    def _line(self, trial: Trial) -> dict[str, Any]:
        """What the history says of a trial, without what came of it."""
        rescale = self.space.rescale(trial.candidate)
        line: dict[str, Any] = {
            "evaluation": len(self.outcomes),
            "factors": list(rescale.factors),
            "start_tokens": rescale.start_tokens,
            "attention_factor": rescale.attention_factor,
            "forwards": self.price.of(trial),
        }
        return line | ({} if trial.part is None else {"part": trial.part})

    def _replay(self, trial: Trial, generation: int) -> None:
        number = len(self.outcomes)
        # Histories of Algorithm 1 from before there were prices have none.
        line: dict[str, Any] = {"forwards": 1.0} | self.history[number]
        loss, slope = line.get("loss", "none"), line.get("slope", [])
        fits = loss is None or isinstance(loss, float)
        fits &= len(slope) == (self.space.dimensions if trial.slope else 0)
        asked = self._line(trial)
        fits &= {name: line.get(name) for name in asked} == asked
        if not fits or line.get("part") != trial.part:
            raise ValueError(
                f"{self.record.history} is damaged at evaluation {number}, or another version's: "
                f"it is not what this search asked for; delete {self.out} to start over"
            )
        found = Outcome(
            math.nan if loss is None else loss,
            tuple(math.nan if number is None else number for number in slope),
        )
        self._keep(trial, found, generation, replayed=True)

    def _record(self, trial: Trial, outcome: Outcome, generation: int) -> None:
        if self.ranks.first:
            plain = trial.part is None and not trial.slope
            names = (name for name, c in self.starts.items() if plain and c == trial.candidate)
            line = self._line(trial) | {
                "loss": outcome.loss if math.isfinite(outcome.loss) else None,
                "generation": generation,
                "start": next(names, None),
            }
            if trial.slope:
                line["slope"] = [x if math.isfinite(x) else None for x in outcome.slope]
            append_line(self.record.history, line)
        self.computed += 1
        self._keep(trial, outcome, generation, replayed=False)

    def _keep(self, trial: Trial, outcome: Outcome, generation: int, *, replayed: bool) -> None:
        self.outcomes[trial] = outcome
        self.forwards += self.price.of(trial)
        self._report(outcome.loss, generation, replayed=replayed)

    def report_start(self) -> None:
        """Say that the search begins: nothing stands against it any more."""
        self._report(math.nan, 0, replayed=False)

    def _report(self, loss: float, generation: int, *, replayed: bool) -> None:
        left = None
        if self._seconds:
            recent = sorted(self._seconds[-15:])
            left = recent[len(recent) // 2] * (self.total - self.forwards)
        self.report(
            Progress(
                evaluations=len(self.outcomes),
                forwards=self.forwards,
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
        """Of the named starts: on all windows, or on those that all of them were compared on."""
        known: dict[str, dict[int | None, float]] = {}
        for name, candidate in self.starts.items():
            for part in (None, *range(self.price.parts)):
                outcome = self.outcomes.get(Trial(candidate, part))
                if outcome is not None:
                    known.setdefault(name, {})[part] = outcome.loss
        # What is compared at present may lack a window that the others have.
        shared = {part for losses in known.values() for part in losses if part is not None}
        shared = shared or {None}
        whole = {name: losses for name, losses in known.items() if shared <= losses.keys()}
        return {n: sum(losses[p] for p in shared) / len(shared) for n, losses in whole.items()}

    def best(self, portable: bool) -> tuple[float, Candidate] | None:
        """The least loss on all windows, and whose it is."""
        finite = [
            (round(outcome.loss, 6), number, trial)
            for number, (trial, outcome) in enumerate(self.outcomes.items())
            if trial.part is None
            and math.isfinite(outcome.loss)
            and not (portable and not trial.candidate.portable)
        ]
        if not finite:
            return None
        _, _, trial = min(finite, key=lambda entry: entry[:2])
        return self.outcomes[trial].loss, trial.candidate

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
            "method": f"search ({self.config.config.algorithm})",
            "loss": loss,
            "evaluations": len(self.outcomes),
            "forwards": round(self.forwards, 2),
            "seed": self.config.seed,
            "documents": list(self.config.documents),
            "config_hash": self.config.sha256,
        }
        return self.space.rescale(candidate).replace(provenance=record | more)

    def result(self, provenance: dict[str, Any]) -> SearchResult:
        best, portable = self.best(False), self.best(True)
        if best is None:
            raise ValueError(
                f"none of {len(self.outcomes)} candidates has a finite loss; look at the model's "
                "weights, or try --dtype float32"
            )
        return SearchResult(
            best=self._with_provenance(best, provenance),
            best_loss=best[0],
            portable=self._with_provenance(portable, provenance) if portable else None,
            portable_loss=portable[0] if portable else None,
            starts={n: loss for n, loss in self.start_losses().items() if math.isfinite(loss)},
            evaluations=len(self.outcomes),
            forwards=round(self.forwards, 2),
            computed=self.computed,
            not_finite=sum(not math.isfinite(found.loss) for found in self.outcomes.values()),
        )
