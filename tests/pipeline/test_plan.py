"""The plan: which stages, in which order, at what cost; and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml

from longrope.distributed import Ranks
from longrope.models.info import inspect_model
from longrope.pipeline.checks import check_settings
from longrope.pipeline.plan import evaluation_lengths, make_plan
from longrope.pipeline.recipe import make_recipe
from longrope.pipeline.run_state import Run
from longrope.search.cost import window_passes
from longrope.search.settings import GradientSearchConfig


@pytest.fixture(scope="module")
def info():
    return inspect_model("bundled")


def plan(info, **content):
    return make_plan(info, make_recipe(content))


def names(plan):
    return [stage.name for stage in plan.stages]


END = ["recovery-1", "recovery-2", "recovery", "export", "evaluate", "report"]


def test_up_to_8x_needs_no_training(info):
    assert names(plan(info, target="8x")) == ["search", *END]
    made = plan(info, target="2x")
    assert names(made) == ["search", "recovery-1", "recovery", "export", "evaluate", "report"]
    assert made.trained is None


def test_where_the_model_counts_in_the_boundary_that_stays(info):
    """Ministral 3: its scores grow with the position, in units of its original length."""
    counting = dataclasses.replace(info, boundary=256)
    made = plan(counting, target="8x", rope_scaling="replace")
    assert names(made) == ["search", *(name for name in END if name != "recovery-2")]
    counting.check_representable("replace", 256)
    with pytest.raises(ValueError, match=r"\(256\).*\(512\)"):
        counting.check_representable("replace", 512)


def test_training_may_be_asked_for(info):
    made = plan(info, target="8x", finetune={"enabled": True})
    assert names(made) == ["search", "finetune", *END]
    assert (made.trained, made.target) == (2048, 2048)


@pytest.mark.parametrize(("target", "trained"), [("64x", 2048), ("512x", 16_384), ("12x", 512)])
def test_beyond_8x_it_is_searched_and_trained_at_an_eighth(info, target, trained):
    made = plan(info, target=target)
    assert names(made) == ["search", "finetune", "second-search", *END]
    assert made.trained == trained
    assert made["search"].length == made["finetune"].length == trained
    assert made["second-search"].length == made.target


def test_trained_at_another_length(info):
    made = plan(info, target="16x", finetune={"length": "16x"})
    assert names(made) == ["search", "finetune", *END]
    assert made.trained == 4096
    assert plan(info, target="16x", finetune={"length": "1k"}).trained == 1024
    with pytest.raises(ValueError, match=r"finetune.length is 8,192; .* 256, .* 4,096"):
        plan(info, target="16x", finetune={"length": "8k"})


def test_by_way_of_another_length(info):
    made = plan(info, target="64x", finetune={"through": "1k", "through_steps": 7})
    assert names(made)[:4] == ["through-search", "through-finetune", "search", "finetune"]
    assert made["through-finetune"].length == 1024
    assert made["through-finetune"].steps == 7
    with pytest.raises(ValueError, match=r"finetune.through is 2,048; .* 256, .* 2,048"):
        plan(info, target="64x", finetune={"through": "2k"})


def test_trained_once_more_under_the_target_s_factors(info):
    made = plan(info, target="64x", finetune={"final": {"steps": 7}, "through": "1k"})
    assert names(made)[4:] == ["second-search", "final-finetune", *END]
    assert (made["final-finetune"].steps, made["final-finetune"].length) == (
        7,
        made["finetune"].length,
    )
    shorter = {"final": {"steps": 7, "sequence_length": "1k"}}
    assert plan(info, target="64x", finetune=shorter)["final-finetune"].length == 1024
    # Jumps reach as far from pieces that are shorter than the original length.
    assert (
        plan(info, target="64x", finetune={"final": {"steps": 7, "sequence_length": "64"}})[
            "final-finetune"
        ].length
        == 64
    )
    with pytest.raises(ValueError, match=r"finetune.final.sequence_length is 8; .* at least 16"):
        plan(info, target="64x", finetune={"final": {"steps": 7, "sequence_length": "8"}})
    with pytest.raises(ValueError, match=r"final.sequence_length is 4,096; .* at most .* 2,048"):
        plan(info, target="64x", finetune={"final": {"steps": 7, "sequence_length": "4k"}})
    short = plan(info, target="64x", finetune={"sequence_length": "1k", "final": {"steps": 7}})
    assert [short[name].length for name in ("search", "finetune", "final-finetune")] == [
        2048,
        1024,
        1024,
    ]
    # No final fine-tuning where no second search follows.
    direct = plan(info, target="8x", finetune={"enabled": True, "final": {"steps": 7}})
    assert names(direct) == ["search", "finetune", *END]


def test_a_stage_begins_with_what_those_before_it_left(info):
    made = plan(info, target="64x", finetune={"final": {"steps": 7}, "through": "1k"})
    assert made.before("through-finetune", "finetune") is None
    assert made.before("finetune", "finetune") == "through-finetune"
    assert made.before("second-search", "finetune") == "finetune"
    assert made.before("final-finetune", "search") == "second-search"
    for name in ("recovery-1", "recovery-2", "export", "evaluate"):
        assert made.before(name, "finetune") == "final-finetune"


def test_without_recovery(info):
    made = plan(info, target="64x", recovery={"enabled": False})
    assert names(made)[3:] == ["export", "evaluate", "report"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"target": "1024x"}, r"target is 262,144, 1024 times.*reaches 512x \(131,072\)"),
        (
            {"target": "16x", "finetune": {"enabled": False}},
            "target is 4,096, 16 .* 8x .*finetune.enabled",
        ),
        ({"target": "256"}, "handles 256 already"),
        ({"target": "8x", "serch": {}}, "no key 'serch'; .*model, target"),
        (
            {"target": "8x", "search": {"buget": 3}},
            "no key 'search.buget'; .*method",
        ),
        ({"target": "8x", "search": {"population": 8}}, "search.population is 8: .* evolution"),
        ({"target": "8x", "recovery": {"algorithm": "x"}}, "recovery.algorithm is 'x'; choose"),
        ({"target": "8x", "search": {"method": "yam"}}, "search.method is 'yam'; .*search"),
        ({"target": "8x", "finetune": {"precision": "fp8"}}, "finetune.precision is 'fp8'"),
        ({"target": "8x", "finetune": {"steps": 0}}, "finetune.steps is 0"),
        ({"target": "8x", "evaluate": {"methods": ["x"]}}, "evaluate.methods: no method 'x'"),
        ({}, "target is {}: field required"),
        ({"target": 1000}, r"target is 1,000; .* 256"),
        ({"target": "8x", "evaluate": {"lengths": [384]}}, "lengths is 256, 384, 2048; 384 "),
        ({"target": "8x", "evaluate": {"lengths": ["4k"]}}, "evaluate.lengths: 4,096 .* 2,048"),
        ({"target": "16x", "finetune": {"answer_share": 0.1}}, "finetune.passkey_share is 0"),
        ({"target": "16x", "finetune": {"distill": True}}, "finetune.short_share is 0"),
        (
            {"target": "16x", "finetune": {"final": {"sequence_length": "512"}}},
            "finetune.final.steps is 0",
        ),
        ({"target": "8x", "finetune": {"beta2": 1.5}}, "finetune.beta2 is 1.5"),
        ({"target": "8x", "seed": -1}, "seed is -1"),
        ({"target": "8x", "search": {"max_factor": 0.5}}, "search.max_factor is 0.5"),
    ],
)
def test_what_cannot_work_is_refused_by_name(info, content, message):
    with pytest.raises(ValueError, match=message):
        plan(info, **content)


def test_lengths_are_doublings(info):
    recipe = make_recipe({"target": "64x"})
    assert evaluation_lengths(recipe, 256, 2048) == [256, 512, 1024, 2048]
    assert evaluation_lengths(recipe, 256, 3072) == [256, 512, 1024, 3072]
    asked = make_recipe({"target": "64x", "evaluate": {"lengths": ["2x", "1k"]}})
    assert evaluation_lengths(asked, 256, 2048) == [256, 512, 1024, 2048]


def test_costs_are_those_of_the_work(info):
    search = {"budget": 10, "windows": 3}
    made = plan(info, target="8x", search=search | {"transfer": "none"})
    stage = made["search"]
    assert (stage.forwards, stage.tokens) == (30, 30 * 2048)
    # A window of each other kind; five candidates on four windows of the text and eight others.
    assert plan(info, target="8x", search=search)["search"].forwards == 10 * (3 + 4) + 5 * (4 + 8)
    validated = plan(info, target="8x", search=search | {"transfer": "validate"})
    assert validated["search"].forwards == 10 * 3 + 5 * (4 + 8)
    # Longer windows: the other kinds are joined to one of 65,536 tokens at most.
    config = GradientSearchConfig(budget=10, windows=3)
    assert window_passes(config, 65_536) == 10 * (3 + 1) + 5 * (4 + 2)
    assert window_passes(config, 2**17) == 10 * 3.5 + 5 * (4 + 1)
    assert stage.linear == pytest.approx(2 * info.parameters * stage.tokens)
    # 4 · layers · heads · head_dim · T² / 2 a window
    assert stage.attention == 30 * 4 * 5 * 3 * 64 * 2048**2 / 2
    training = plan(
        info, target="8x", finetune={"enabled": True, "steps": 5, "batch": 4, "short_share": 1.0}
    )["finetune"]
    assert training.tokens == 2 * 5 * 4 * 2048
    assert training.memory > 16 * info.parameters
    half = {"enabled": True, "steps": 5, "batch": 4, "short_share": 1 / 16}  # of a window a piece
    assert plan(info, target="8x", finetune=half)["finetune"].tokens == 4 * (5 * 2048 + 3 * 256)


def test_a_teacher_costs_its_forwards_and_its_weights(info):
    tuning = {"enabled": True, "steps": 5, "batch": 4, "short_share": 1.0}
    alone = plan(info, target="8x", finetune=tuning)["finetune"]
    taught = plan(info, target="8x", finetune=tuning | {"distill": True})["finetune"]
    more = taught.linear - alone.linear
    assert more == pytest.approx(2 * info.parameters * 5 * 4 * 2048)  # all short windows once
    assert taught.memory - alone.memory > 4 * info.parameters


@pytest.mark.parametrize("family", ["llama", "mixtral", "deepseek_v3", "lfm2"])
def test_flops_agree_with_a_counter(micro_models, checkpoints, ids, family):
    """torch's own count of a plain forward, whose attention is causal by mask."""
    from torch.utils.flop_counter import FlopCounterMode

    model = micro_models(family)
    model.set_attn_implementation("eager")  # the counter does not know the CPU's flash kernel
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids[:1], use_cache=False)
    model.set_attn_implementation("sdpa")
    info = inspect_model(str(checkpoints(family)))
    made = make_plan(
        info,
        make_recipe(
            {
                "target": "512",
                "search": {
                    "algorithm": "evolution",
                    "budget": 1,
                    "windows": 1,
                    "transfer": "none",
                },
            }
        ),
    )
    stage = made["search"]
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    linear = 97 / 512 * stage.linear - 2 * 97 * norms
    attention = 2 * stage.attention * (97 / 512) ** 2  # the counter counts both halves
    assert counter.get_total_flops() == pytest.approx(linear + attention, rel=0.02)


def test_a_sliding_window_s_layers_cost_what_they_see(checkpoints):
    info = inspect_model(str(checkpoints("gemma3")))  # two layers see all, two 24 tokens
    row, column = np.indices((512, 512))
    seen = [(column <= row).sum(), ((column <= row) & (column > row - 24)).sum()]
    search = {"algorithm": "evolution", "budget": 1, "windows": 1, "transfer": "none"}
    work = {"target": "512", "search": search}
    work["finetune"] = {"enabled": True, "steps": 1, "batch": 1, "gradient_checkpointing": False}
    work["finetune"] |= {"short_share": 0, "distill": False}
    made = make_plan(info, make_recipe(work))
    flops = 4 * 4 * 32 * 2 * np.array(seen)
    assert made["search"].attention == pytest.approx(flops.sum(), rel=0.01)
    assert made["finetune"].attention == pytest.approx(3 * flops.sum(), rel=0.01)


def test_training_on_another_gpu_than_the_first_is_refused(info, tmp_path):
    recipe = make_recipe({"target": "64x", "execution": {"device": "cuda:1"}})
    run = Run(recipe, info, make_plan(info, recipe), tmp_path, Ranks())
    with pytest.raises(ValueError, match=r"device is cuda:1, .* CUDA_VISIBLE_DEVICES=1"):
        check_settings(run, run.plan.stages)
    check_settings(run, [stage for stage in run.plan.stages if stage.kind != "finetune"])


def test_float16_is_refused_for_a_gradient_search(info):
    half = {"dtype": "float16"}
    with pytest.raises(ValueError, match=r"dtype is float16.*search"):
        plan(info, target="8x", execution=half)
    paper = {"algorithm": "evolution"}
    plan(info, target="8x", execution=half, search=paper, recovery=paper)


def test_how_it_is_computed_may_change_on_the_way(info, tmp_path):
    def claim(**changes):
        recipe = make_recipe({"target": "8x", **changes})
        Run(recipe, info, make_plan(info, recipe), tmp_path, Ranks()).claim()

    claim(execution={"chunk_size": 2048})
    claim()
    claim(execution={"offload_activations": "cpu", "offload_weights": True, "device": "cpu"})
    with pytest.raises(ValueError, match=r"seed \(there 0, now 5\)"):
        claim(seed=5)


def test_a_run_of_an_older_layout_is_refused_as_such(info, tmp_path):
    recipe = make_recipe({"target": "8x"})
    content = recipe.model_dump(mode="json")
    content["search"]["samples"] = content["search"].pop("windows")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"older version .*search\.samples.*`out`"):
        Run(recipe, info, make_plan(info, recipe), tmp_path, Ranks()).claim()
