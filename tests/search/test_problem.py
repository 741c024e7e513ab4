"""Where the three searches start, and how far they may go."""

import numpy as np
import pytest

from longrope.models.info import inspect_model
from longrope.rope.rescale import default_attention_factor
from longrope.search.problem import (
    PUBLISHED,
    first_search_problem,
    recovery_problem,
    second_search_factors,
    second_search_problem,
)


@pytest.fixture(scope="module")
def info():
    return inspect_model("bundled")


@pytest.fixture(scope="module")
def finetuned(info):
    return info.rescale("yarn", 2048).replace(attention_factor=1.17)


def test_second_multiplies_the_fine_tuned_factors(info, finetuned):
    problem = second_search_problem(info, finetuned, 16_384)
    space = problem.space
    assert space.top == 1000  # 1.25 · s₂
    assert space.start_tokens == (0,)
    assert set(problem.starts) == {"pi", "ntk", "yarn", "yarn-log"}
    for candidate in problem.starts.values():
        assert space.contains(candidate)
        rescale = space.rescale(candidate)
        assert rescale.max_position_embeddings == 16_384
        assert rescale.original_max_position_embeddings == 256
        assert rescale.attention_factor == default_attention_factor(256, 16_384)
        assert (np.array(rescale.factors) >= np.array(finetuned.factors)).all()
    pi = np.divide(space.rescale(problem.starts["pi"]).factors, finetuned.factors)
    np.testing.assert_allclose(pi, 8)


def test_the_step_of_yarn_is_yarn_itself_on_an_unscaled_model(info):
    """The ramp in turns equals YaRN's in dimensions, but for the rounding of its ends."""
    unscaled = info.rescale("none", 256)
    step = second_search_factors(info, unscaled, "yarn", 2048)
    known = np.array(info.rescale("yarn", 2048).factors)
    assert (step[0], step[-1]) == (1, 8)
    ramp = (1 - 1 / step) / (1 - 1 / 8)
    expected = (1 - 1 / known) / (1 - 1 / 8)
    assert np.abs(ramp - expected).max() < 0.12  # one dimension of the ten of the ramp


def test_the_step_of_yarn_sees_the_rescaled_frequencies(info, finetuned):
    step = second_search_factors(info, finetuned, "yarn", 16_384)
    turns = 2048 * finetuned.inv_freq / (2 * np.pi)
    np.testing.assert_allclose(step[turns <= 1], 8)
    np.testing.assert_allclose(step[turns >= 32], 1)
    assert (np.diff(step) >= 0).all()
    logarithmic = second_search_factors(info, finetuned, "yarn-log", 16_384)
    np.testing.assert_allclose(logarithmic[turns <= 4], 8)


def test_recovery_starts_from_the_original_and_ends_at_the_fine_tuned(info, finetuned):
    problem = recovery_problem(info, finetuned, 512, attention_factor=1.3)
    space = problem.space
    assert space.top == round(125 * max(finetuned.factors))
    original = space.rescale(problem.starts["original"])
    assert set(original.factors) == {1.0}
    assert original.attention_factor == 1.3
    assert original.max_position_embeddings == 512
    np.testing.assert_allclose(
        space.rescale(problem.starts["fine-tuned"]).factors, finetuned.factors, atol=0.006
    )
    half = np.array(space.rescale(problem.starts["shrunk to 0.5"]).factors)
    np.testing.assert_allclose(half, np.sqrt(finetuned.factors), atol=0.006)
    assert all(space.contains(candidate) for candidate in problem.starts.values())


def test_first_is_bounded_by_the_paper(info):
    problem = first_search_problem(info, 2048, start_tokens=(0,))
    assert problem.space.top == 1000
    assert set(problem.starts) == {"pi", *PUBLISHED}
    assert problem.space.start.attention_factor == default_attention_factor(256, 2048)


def test_published_methods_keep_their_own_attention_factors(info):
    problem = first_search_problem(info, 2048)
    assert problem.published == {name: info.rescale(name, 2048) for name in PUBLISHED}
    assert problem.published["yarn"].attention_factor == pytest.approx(1 + 0.1 * np.log(8))
    given = first_search_problem(info, 2048, attention_factor=1.5)
    assert {rescale.attention_factor for rescale in given.published.values()} == {1.5}


def test_ramps_are_a_family_with_ntk_in_it(info):
    problem = first_search_problem(info, 2048)
    turns = 256 * info.rescale("none", 256).inv_freq / (2 * np.pi)
    factors = np.array(problem.space.rescale(problem.ramp(16, 0.5)).factors)
    np.testing.assert_allclose(factors[turns > 16], 1)
    np.testing.assert_allclose(factors[turns < 0.5], 8)
    middle = np.abs(turns - np.sqrt(16 * 0.5)).argmin()
    assert factors[middle] == pytest.approx(8**0.5, rel=0.2)
    assert (np.diff(factors) >= 0).all()
    assert problem.ramp(turns[0], turns[-1]) == problem.starts["ntk"]
    assert problem.ramp(1e99, 1e98) == problem.starts["pi"]


def test_starts_have_the_dimensions_that_turn(checkpoints):
    """Gemma 4's other dimensions keep the factor that they have."""
    info = inspect_model(str(checkpoints("gemma4")))
    problem = first_search_problem(info, 512)
    assert problem.space.dimensions == 4
    for candidate in (*problem.starts.values(), problem.ramp(16, 0.5)):
        assert problem.space.contains(candidate)
        assert set(problem.space.rescale(candidate).factors[4:]) == {1e30}
    finetuned = problem.space.rescale(problem.starts["yarn"])
    second, third = (
        second_search_problem(info, finetuned, 1024),
        recovery_problem(info, finetuned, 64, 1.1),
    )
    for step in (second, third):
        assert all(step.space.contains(candidate) for candidate in step.starts.values())
