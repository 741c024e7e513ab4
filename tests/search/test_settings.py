import pytest

from longrope.search.settings import (
    EvolutionSearchConfig,
    GradientSearchConfig,
    make_search_config,
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 3}, "budget is 3"),
        ({"step_size": 0.0}, "step_size is 0.0"),
        ({"step_size": float("inf")}, "step_size is inf"),
        ({"windows_per_step": 0}, "windows_per_step is 0"),
        ({"windows": 0}, "windows is 0"),
        ({"passkey_prompts": -1}, "passkey_prompts is -1"),
        ({"max_factor": 0.5}, "max_factor is 0.5"),
        ({"max_factor": float("nan")}, "max_factor is nan"),
        ({"population": 64}, "population is 64: .*algorithm evolution"),
        ({"patience": 2}, "patience is 2: .*algorithm evolution"),
        ({"algorithm": "magic"}, "algorithm is 'magic'; .*gradient, evolution"),
        ({"samples": 2}, "no key 'samples'; .*windows"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_search_config(options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population": 0}, "population is 0"),
        ({"parents": 0}, "parents is 0"),
        ({"iterations": 0}, "iterations is 0"),
        ({"patience": 0}, "patience is 0"),
        ({"budget": 0}, "budget is 0"),
        ({"budget": 1345}, "budget is 1345"),
        ({"mutations": -1}, "mutations is -1"),
        ({"mutations": 0, "crossovers": 0}, "mutations and crossovers .*0"),
        ({"mutation_probability": 0.0}, "mutation_probability is 0.0"),
        ({"mutation_probability": 1.5}, "mutation_probability is 1.5"),
        ({"step_size": 0.06}, "step_size is 0.06: .*algorithm gradient"),
        ({"windows_per_step": 1}, "windows_per_step is 1: .*algorithm gradient"),
    ],
)
def test_wrong_options_of_evolution_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_search_config({"algorithm": "evolution", **options})


def test_gradient_is_the_default():
    assert make_search_config({"windows": 2}) == GradientSearchConfig(windows=2)
    assert make_search_config({"algorithm": "evolution"}) == EvolutionSearchConfig()
    assert make_search_config(EvolutionSearchConfig(parents=3).model_dump()).parents == 3


def test_where_to_stop_is_no_part_of_an_evolution_s_identity():
    assert EvolutionSearchConfig(budget=5, patience=2).identity() == (
        EvolutionSearchConfig().identity()
    )
    assert GradientSearchConfig(budget=5).identity() != GradientSearchConfig().identity()
