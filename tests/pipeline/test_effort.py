"""`--effort`: what is chosen, on which grounds, and that the user's settings win."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope.distributed import Ranks
from longrope.models.info import inspect_model
from longrope.pipeline.effort import Situation, apply_choices, choose_settings
from longrope.pipeline.estimate import H100, Estimate, Memory, parse_gpus
from longrope.pipeline.extend import open_run
from longrope.pipeline.plan import make_plan
from longrope.pipeline.recipe import make_recipe
from pipeline.test_plan import info
from pipeline.test_recipe import SHAPES

assert info is not None  # a fixture

PLENTY = Memory(10**13)


def chosen(info, situation=None, **content):
    recipe = make_recipe(content)
    choices = choose_settings(recipe, info, situation or Situation(PLENTY, on_cpu=True))
    return {choice.key: choice for choice in choices}, apply_choices(recipe, choices)


@pytest.fixture(scope="module")
def llama2(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama2-7b")
    config = SHAPES["llama2-7b"]()
    config.dtype = "float16"  # as its checkpoint has it
    config.save_pretrained(directory)
    return inspect_model(str(directory))


def test_a_small_model_trains_as_the_measured_run_did(info):
    _, recipe = chosen(info, target="64x")
    tuning = recipe.finetune
    tokens = (tuning.steps + tuning.final.steps) * tuning.batch * 2048 * (1 + tuning.short_share)
    assert tokens == pytest.approx(1.42e6, rel=0.03)
    assert (tuning.sequence_length, tuning.batch, tuning.learning_rate) == ("2048", 1, 7e-4)
    assert (tuning.distill, tuning.passkey_share) == (True, 0.4)
    assert 2 * tuning.final.steps == pytest.approx(tuning.steps, abs=2)


@pytest.mark.parametrize("target", ["16x", "64x", "512x"])
def test_training_costs_at_most_a_tenth_of_the_paper_s(info, target):
    def flops(effort):
        _, recipe = chosen(info, target=target, effort=effort)
        stages = make_plan(info, recipe, on_cpu=True).stages
        return sum(s.linear + s.attention for s in stages if s.kind == "finetune")

    assert flops("quick") < flops("standard") <= 0.1 * flops("paper")


@pytest.mark.parametrize(("target", "hours"), [("128k", 8), ("2048k", 48)])
def test_a_7b_fits_one_h100_and_its_hours(llama2, target, hours):
    """At the measured speed of whole forward passes; every stage included."""
    memory = parse_gpus("1x80GB")
    choices, recipe = chosen(llama2, Situation(memory), target=target)
    estimate = Estimate(make_plan(llama2, recipe), H100, H100, memory)
    estimate.check()
    assert sum(map(estimate.seconds, estimate.plan.stages)) < hours * 3600
    assert recipe.execution.dtype == "bfloat16"
    assert "135 GB" in choices["finetune.lora"].reason or target == "2048k"
    assert recipe.finetune.learning_rate == pytest.approx(2e-5, rel=0.05)


def test_what_does_not_fit_is_made_smaller(llama2):
    _, large = chosen(llama2, Situation(parse_gpus("8x80GB"), processes=8), target="128k")
    assert (large.finetune.lora, large.finetune.batch % 8) == (None, 0)
    choices, small = chosen(llama2, Situation(parse_gpus("1x24GB")), target="128k")
    tuning = small.finetune
    assert (tuning.lora, tuning.precision, tuning.distill) == (64, "pure-bf16", False)
    assert "do not fit" in choices["finetune.sequence_length"].reason
    stages = make_plan(llama2, small).stages
    assert all(stage.memory <= 24e9 for stage in stages)
    # As many tokens in shorter sequences.
    shorter, longer = (
        r.finetune.batch * int(r.finetune.sequence_length or 0) for r in (small, large)
    )
    assert shorter == pytest.approx(longer, rel=0.5)


def test_little_text_is_read_four_times_at_most(info):
    text = 100_000
    choices, recipe = chosen(info, Situation(PLENTY, text, on_cpu=True), target="64x")
    tuning = recipe.finetune
    read = (tuning.steps + tuning.final.steps) * tuning.batch * 2048 * (1 - tuning.passkey_share)
    assert read <= 4 * text
    assert "100,000" in choices["finetune.steps"].reason


def test_a_given_key_is_never_chosen_and_the_others_follow_it(info):
    tuning = {"batch": 4, "steps": 7, "passkey_share": 0.0, "short_share": 0.0}
    choices, recipe = chosen(info, target="64x", finetune=tuning, search={"budget": 9})
    assert {f"finetune.{key}" for key in tuning}.isdisjoint(choices)
    assert {key: getattr(recipe.finetune, key) for key in tuning} == tuning
    # Settings that need them are not chosen either.
    assert {"finetune.answer_share", "finetune.distill"}.isdisjoint(choices)
    assert recipe.search.config.budget == 9
    assert recipe.finetune.final.steps == 3  # half of the steps before
    paper = {"effort": "paper", "search": {"budget": 9}}
    assert chosen(info, target="64x", **paper)[1].search.config.algorithm == "gradient"
    paper = {"effort": "paper", "search": {"windows": 3}}
    found = chosen(info, target="64x", **paper)[1].search.config
    assert (found.algorithm, found.windows) == ("evolution", 3)
    tuning = {"micro_batch": 4}
    assert chosen(info, target="16x", finetune=tuning)[1].finetune.batch % 4 == 0


def test_up_to_8x_nothing_is_trained(info):
    choices, recipe = chosen(info, target="8x")
    assert not [key for key in choices if key.startswith(("finetune", "second"))]
    assert recipe.evaluate.passkey_trials == 10


def test_the_paper_s_schedule_is_the_paper_s(info):
    _, recipe = chosen(info, target="64x", effort="paper")
    tuning = recipe.finetune
    assert (tuning.steps, tuning.batch, tuning.learning_rate) == (400, 32, 2e-5)
    assert (tuning.sequence_length, tuning.final.steps, tuning.short_share) == (None, 0, 0)
    searches = recipe.search.config, recipe.second_search.config, recipe.recovery.config
    assert {search.algorithm for search in searches} == {"evolution"}
    assert [search.forwards for search in searches] == [1344] * 3


@given(
    target=st.sampled_from(["9x", "16x", "64x", "512x"]),
    effort=st.sampled_from(["quick", "standard", "paper"]),
    text=st.one_of(st.none(), st.integers(2048, 10**9)),
    processes=st.integers(1, 9),
    memory=st.integers(10**6, 10**12),
)
def test_every_choice_makes_a_plan(target, effort, text, processes, memory):
    info = inspect_model("bundled")
    situation = Situation(Memory(memory), text, processes, on_cpu=True)
    choices, recipe = chosen(info, situation, target=target, effort=effort)
    plan = make_plan(info, recipe, on_cpu=True)
    if effort != "paper":  # its batch is fixed
        assert recipe.finetune.accumulation(processes) >= 1
    assert plan["finetune"].steps >= 1
    assert all(choice.reason for choice in choices.values())
    # Recorded and read back they are the same settings.
    values = json.loads(json.dumps([choice.value for choice in choices.values()]))
    assert values == [choice.value for choice in choices.values()]


def test_a_started_run_keeps_the_settings_that_were_chosen_for_it(texts, tmp_path, monkeypatch):
    content = {"target": "16x", "data": [str(texts)], "execution": {"dtype": "float32"}}

    def opened(out, memory=PLENTY, **changes):
        monkeypatch.setattr("longrope.pipeline.extend.available", lambda *_: memory)
        return open_run(make_recipe(content | changes), out, Ranks())

    first = opened(tmp_path)
    assert first.claim()
    # With less memory another run would have LoRA.
    assert opened(tmp_path / "fresh", Memory(10**7)).recipe.finetune.lora
    again = opened(tmp_path, Memory(10**7))
    assert again.recipe == first.recipe
    assert not again.claim()
    for changes, name in (
        ({"finetune": {"steps": 3}}, "finetune.steps"),
        ({"effort": "quick"}, "effort"),
    ):
        with pytest.raises(ValueError, match=rf"differs in .*{name} \(there"):
            opened(tmp_path, **changes).claim()
    # A plan is not a run: it chooses anew.
    planned = open_run(make_recipe(content | {"effort": "quick"}), tmp_path, Ranks(), resume=False)
    assert planned.recipe.second_search.method == "yarn"
