import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope.rope import methods
from longrope.search.space import START_TOKENS, Candidate, Space


def space(scale: float = 8.0, dim: int = 64) -> Space:
    start = methods.identity(1e4, dim, 256, int(256 * scale))
    return Space(start.replace(attention_factor=1.17), 1.25 * scale)


@st.composite
def candidates(draw, of: Space):
    numbers = st.integers(100, of.top)
    hundredths = draw(st.lists(numbers, min_size=of.dimensions, max_size=of.dimensions))
    return Candidate(tuple(sorted(hundredths)), draw(st.sampled_from(START_TOKENS)))


SPACE = space()
seeds = st.integers(0, 2**32)


@given(candidates(SPACE), seeds, st.floats(0.01, 1.0))
def test_mutants_are_candidates(candidate, seed, probability):
    assert SPACE.contains(SPACE.mutate(candidate, probability, random.Random(seed)))


@given(candidates(SPACE), candidates(SPACE), seeds)
def test_children_are_candidates_made_of_their_parents(a, b, seed):
    child = SPACE.cross(a, b, random.Random(seed))
    assert SPACE.contains(child)
    assert child.start_tokens in (a.start_tokens, b.start_tokens)
    genes = zip(child.hundredths, a.hundredths, b.hundredths, strict=True)
    assert all(gene in parents for gene, *parents in genes)


def test_the_rate_of_mutation_is_the_one_stated():
    rng = random.Random(0)
    candidate = Candidate(tuple(range(100, 1000, 29))[:32])
    changed = 0
    for _ in range(400):
        mutant = SPACE.mutate(candidate, 0.3, rng)
        changed += sum(a != b for a, b in zip(mutant.hundredths, candidate.hundredths, strict=True))
    assert changed / (400 * 32) == pytest.approx(0.3, abs=0.03)


def test_every_gene_can_reach_every_value_between_its_neighbours():
    rng = random.Random(0)
    candidate = Candidate((100,) * 16 + (110,) * 16)
    tiny = Space(methods.identity(1e4, 64, 256, 2048), 1.2)
    last = {tiny.mutate(candidate, 0.3, rng).hundredths[-1] for _ in range(3000)}
    assert last == set(range(110, 121))


@given(candidates(SPACE))
def test_a_candidate_survives_being_a_rescale(candidate):
    rescale = SPACE.rescale(candidate)
    assert rescale.attention_factor == 1.17
    assert rescale.max_position_embeddings == 2048
    assert SPACE.nearest(rescale) == candidate


@given(scale=st.sampled_from([2.0, 8.0, 64.0]), dim=st.sampled_from([8, 64, 128]))
def test_the_known_methods_are_near_a_candidate(scale, dim):
    here = space(scale, dim)
    for name in ("pi", "ntk", "yarn"):
        rescale = methods.METHODS[name](1e4, dim, 256, int(256 * scale))
        candidate = here.nearest(rescale)
        assert here.contains(candidate)
        found = here.rescale(candidate).factors
        assert found == pytest.approx(rescale.factors, abs=0.0051)


def test_a_search_may_start_from_other_factors():
    start = methods.yarn(1e4, 64, 256, 2048)
    here = Space(start, 4.0)
    doubled = here.rescale(Candidate((200,) * 32))
    assert doubled.factors == pytest.approx([2 * f for f in start.factors])
    assert here.nearest(doubled) == Candidate((200,) * 32)


@pytest.mark.parametrize(
    "candidate",
    [
        Candidate((100,) * 31),
        Candidate((99,) + (100,) * 31),
        Candidate((100,) * 31 + (1001,)),
        Candidate((101,) + (100,) * 31),
        Candidate((100,) * 32, 3),
    ],
)
def test_what_is_no_candidate(candidate):
    assert not SPACE.contains(candidate)


def test_dimensions_that_do_not_turn_are_none_of_a_candidate_s():
    """Gemma 4's: the search of the others is not held back by them."""
    start = SPACE.start.replace(factors=(1.0, 1.0, 2.0, 1e30, 4e30))
    some = Space(start, 10.0)
    assert some.dimensions == 3
    found = some.rescale(Candidate((100, 300, 900)))
    assert found.factors == (1.0, 3.0, 18.0, 1e30, 4e30)
    assert some.nearest(found) == Candidate((100, 300, 900))
