"""The evolution search: LongRoPE's Algorithm 1 under the monotone constraint."""

import math
import random
from collections.abc import Callable

from longrope.search.problem import Problem
from longrope.search.settings import EvolutionSearchConfig
from longrope.search.space import Candidate, Evaluate, Request, distinct

# Attempts to draw one new candidate: near the end every neighbour of the parents may be known.
_TRIES = 100


def evolution_search(
    evaluate: Evaluate, problem: Problem, config: EvolutionSearchConfig, seed: int
) -> None:
    """Run the evolution search: evaluate one generation of candidates after the other.

    The first generation has the starts and their mutants, later ones mutants and crossovers of
    the best candidates. No candidate is evaluated twice. The same seed and losses give the same
    candidates.

    Args:
        evaluate: returns the results of requests, or raises to end the search.
    """
    rng, space = random.Random(seed), problem.space
    starts = distinct(list(problem.starts.values()))
    ranked: list[tuple[float, int, Candidate]] = []
    known: set[Candidate] = set()

    def mutant(parent: Candidate) -> Candidate:
        return space.mutate(parent, config.mutation_probability, rng)

    def child(parents: list[Candidate]) -> Candidate:
        if len(parents) == 1:
            return mutant(parents[0])
        a, b = rng.sample(parents, 2)
        return space.cross(a, b, rng)

    def add(generation: list[Candidate], draw: Callable[[], Candidate]) -> None:
        for _ in range(_TRIES):
            candidate = draw()
            if candidate not in known and candidate not in generation:
                generation.append(candidate)
                return

    generation = list(starts)
    for index in range(len(starts), config.population):
        parent = starts[index % len(starts)]
        add(generation, lambda parent=parent: mutant(parent))
    generation = generation[: config.population]
    for _ in range(config.iterations + 1):
        if not generation:  # every neighbour is known
            return
        results = evaluate([Request(candidate) for candidate in generation], problem.starts)
        for candidate, result in zip(generation, results, strict=True):
            # Rounded, so that the last bits of a sum do not decide who is a parent.
            rank = round(result.loss, 6) if math.isfinite(result.loss) else math.inf
            ranked.append((rank, len(ranked), candidate))
            known.add(candidate)
        ranked.sort()
        parents = [candidate for _, _, candidate in ranked[: config.parents]]
        generation = []
        for _ in range(config.mutations):
            add(generation, lambda parents=parents: mutant(rng.choice(parents)))
        for _ in range(config.crossovers):
            add(generation, lambda parents=parents: child(parents))
