"""LongRoPE's Algorithm 1: an evolutionary search inside the monotone constraint."""

import math
import random
from collections.abc import Sequence
from typing import Any

from longrope.search.problem import Problem
from longrope.search.settings import EvolutionSearchConfig
from longrope.search.space import Candidate, Outcome, Price, Trial, distinct

# Draws for one new candidate before the search takes what it has: near the end every
# neighbour of the parents may be known.
_TRIES = 100


class Evolution:
    """Ask for a generation of candidates, tell their losses, until ``done``.

    Never asks for a candidate twice. The same seed and the same losses give the same
    candidates, so a search replays from the losses alone.

        >>> algorithm = Evolution(problem, EvolutionSearchConfig(), seed=0)
        >>> while not algorithm.done:
        ...     trials = algorithm.ask()
        ...     algorithm.tell(trials, [Outcome(loss(trial.candidate)) for trial in trials])
    """

    def __init__(
        self,
        problem: Problem,
        settings: EvolutionSearchConfig,
        seed: int,
        price: Price | None = None,  # every trial costs one
    ):
        self.space = problem.space
        self.starts = problem.starts
        self.settings = settings
        self.generation = 0
        self._starts = distinct(list(problem.starts.values()))
        self._rng = random.Random(seed)
        self._ranked: list[tuple[float, int, Candidate]] = []
        self._known: set[Candidate] = set()

    @property
    def done(self) -> bool:
        return self.generation > self.settings.iterations

    def ask(self) -> list[Trial]:
        """The next generation: the starts and mutants of them, then children of the best."""
        return [Trial(c) for c in (self._first() if self.generation == 0 else self._children())]

    def tell(self, trials: Sequence[Trial], outcomes: Sequence[Outcome]) -> None:
        """Losses of the candidates asked for; NaN and infinity lose to every number."""
        for trial, outcome in zip(trials, outcomes, strict=True):
            # Rounded, so that the last bits of a sum cannot decide who is a parent.
            rank = round(outcome.loss, 6) if math.isfinite(outcome.loss) else math.inf
            self._ranked.append((rank, len(self._ranked), trial.candidate))
            self._known.add(trial.candidate)
        self._ranked.sort()
        self.generation += 1

    def _first(self) -> list[Candidate]:
        generation = list(self._starts)
        for index in range(len(generation), self.settings.population):
            parent = self._starts[index % len(self._starts)]
            self._add(generation, lambda parent=parent: self._mutant(parent))
        return generation[: self.settings.population]

    def _children(self) -> list[Candidate]:
        parents = [candidate for _, _, candidate in self._ranked[: self.settings.parents]]
        generation: list[Candidate] = []
        for _ in range(self.settings.mutations):
            self._add(generation, lambda: self._mutant(self._rng.choice(parents)))
        for _ in range(self.settings.crossovers):
            self._add(generation, lambda: self._crossed(parents))
        if not generation:  # every neighbour is known: nothing is left to find
            self.generation = self.settings.iterations + 1
        return generation

    def _mutant(self, parent: Candidate) -> Candidate:
        return self.space.mutate(parent, self.settings.mutation_probability, self._rng)

    def _crossed(self, parents: list[Candidate]) -> Candidate:
        if len(parents) == 1:
            return self._mutant(parents[0])
        a, b = self._rng.sample(parents, 2)
        return self.space.cross(a, b, self._rng)

    def _add(self, generation: list[Candidate], draw: Any) -> None:
        """Add a candidate that was never asked for, within a bounded number of draws."""
        for _ in range(_TRIES):
            candidate = draw()
            if candidate not in self._known and candidate not in generation:
                generation.append(candidate)
                return
