import itertools
import math

import pytest

from longrope.rope import methods
from longrope.search.evolution import evolution_search
from longrope.search.problem import Problem
from longrope.search.settings import EvolutionSearchConfig
from longrope.search.space import Result
from search.test_space import space

SMALL = EvolutionSearchConfig(population=12, mutations=4, crossovers=4, iterations=5, parents=4)


def problem(of):
    names = ("pi", "ntk", "yarn")
    return Problem(of, {n: of.nearest(methods.METHODS[n](1e4, 64, 256, 2048)) for n in names})


def bowl(candidate):
    """Least at λ = 3 everywhere with n̂ = 4."""
    distance = sum((h / 100 - 3) ** 2 for h in candidate.hundredths)
    return distance + abs(candidate.start_tokens - 4)


def run(config, seed, loss=bowl, begin=None):
    asked, losses, generations = [], [], []

    def evaluate(requests, starts=None):
        generation = [request.candidate for request in requests]
        assert all(here.space.contains(candidate) for candidate in generation)
        found = [loss(candidate) for candidate in generation]
        asked.extend(generation)
        losses.extend(found)
        generations.append(generation)
        return [Result(number) for number in found]

    here = begin or problem(space())
    evolution_search(evaluate, here, config, seed)
    assert sum(map(len, generations)) == len(asked)
    return asked, losses


def test_the_papers_budget():
    settings = EvolutionSearchConfig()
    assert settings.forwards == 1344
    assert (settings.population, settings.mutations, settings.crossovers) == (64, 16, 16)
    assert (settings.mutation_probability, settings.iterations, settings.parents) == (0.3, 40, 32)


def test_asks_what_it_should_and_nothing_twice():
    asked, _ = run(SMALL, seed=0)
    assert len(asked) == SMALL.forwards == 12 + 5 * 8
    assert len(set(asked)) == len(asked)
    here = space()
    assert asked[:3] == list(problem(here).starts.values())


def test_finds_a_minimum():
    _, losses = run(EvolutionSearchConfig(), seed=1)
    assert min(losses) < 0.5 * min(losses[:64])


def test_a_seed_is_a_course():
    assert run(SMALL, 3) == run(SMALL, 3)
    assert run(SMALL, 3) != run(SMALL, 4)


def test_differences_below_rounding_decide_nothing():
    tiny = iter(range(10**6))
    assert run(SMALL, 0, lambda c: bowl(c) + 1e-9 * next(tiny))[0] == run(SMALL, 0)[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_has_no_children(bad):
    here = space()
    config = EvolutionSearchConfig(
        population=12, mutations=0, crossovers=8, parents=4, iterations=1
    )
    first = run(config, 0)[0][:12]
    good = first[4:8]
    asked, _ = run(config, 0, lambda candidate: 1.0 if candidate in good else bad)
    assert asked[:12] == first
    children = [candidate.hundredths for candidate in asked[12:]]
    of_good = {
        a.hundredths[:cut] + b.hundredths[cut:]
        for a, b in itertools.permutations(good, 2)
        for cut in range(here.dimensions)
    }
    assert len(children) == 8
    assert of_good.issuperset(children)


def test_a_space_that_is_used_up_ends_the_search():
    from longrope.search.space import Candidate, Space

    tiny = Space(methods.identity(1e4, 4, 256, 512), 1.02, start_tokens=(0,))
    only = Problem(tiny, {"none": Candidate((100, 100))})
    seen, _ = run(EvolutionSearchConfig(population=8), 0, lambda candidate: 0.0, only)
    assert len(set(seen)) == len(seen) <= 6  # all pairs a ≤ b of 100, 101, 102
