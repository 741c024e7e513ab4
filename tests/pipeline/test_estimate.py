"""What stages cost on a machine: their memory and times, and what does not fit is refused."""

import dataclasses

import pytest
import torch
import transformers

from longrope.execution import ExecutionConfig
from longrope.models.info import inspect_model
from longrope.models.load import load_model
from longrope.pipeline.costs import Costs
from longrope.pipeline.estimate import (
    H100,
    Memory,
    Rates,
    available,
    check_memory,
    estimate_plan,
    parse_gpus,
)
from longrope.pipeline.plan import make_plan
from longrope.pipeline.recipe import make_recipe
from pipeline.test_plan import info, plan

assert info is not None  # a fixture


def test_a_plan_that_does_not_fit_is_refused_with_the_numbers(info):
    made = plan(info, target="64x")
    check_memory(made.stages, Memory(10**12))
    with pytest.raises(ValueError, match=r"finetune at 2,048 .* 0\.\d GB .* 0\.\d GB are free"):
        check_memory([made["finetune"]], Memory(10**7))


def test_training_may_be_spread_over_devices_and_a_forward_not(info):
    made = plan(info, target="64x")
    each = made["second-search"].memory - 1
    eight = Memory(each, 8)
    assert made["finetune"].memory <= 8 * each
    check_memory([made["finetune"]], eight)
    with pytest.raises(
        ValueError,
        match=r"second-search .* second_search.algorithm=evolution, .*offload_activations=cpu",
    ):
        check_memory([made["second-search"]], eight)
    kept = plan(info, target="64x", execution={"offload_activations": "cpu"})
    check_memory([kept["second-search"]], eight)


def test_every_device_has_a_teacher_of_its_own(info):
    tuning = {"enabled": True, "short_share": 1.0, "distill": True}
    stage = plan(info, target="8x", finetune=tuning)["finetune"]
    alone = plan(info, target="8x", finetune=tuning | {"distill": False})["finetune"]
    # A teacher, and the logits that it gives; and every device's own activations.
    assert stage.replicated - alone.replicated >= 4 * info.parameters
    assert alone.replicated > 0
    each = (stage.memory - stage.replicated) // 2 + stage.replicated + 2
    check_memory([stage], Memory(each, 2))
    with pytest.raises(ValueError, match=r"finetune.lora=64, .*finetune.distill=false"):
        check_memory([stage], Memory(each - 4, 2))


def test_the_whole_model_is_on_every_device_before_it_is_shared_out(info):
    stage = plan(info, target="8x", finetune={"enabled": True})["finetune"]
    stage = dataclasses.replace(stage, replicated=0)  # its activations alone are more
    whole = 4 * info.parameters
    assert stage.memory < 64 * whole
    check_memory([stage], Memory(whole, 64))
    with pytest.raises(ValueError, match=r"finetune .*FSDP.*finetune\.precision=pure-bf16"):
        check_memory([stage], Memory(whole - 1, 64))


def test_the_estimate_has_a_time_for_every_stage_that_computes(info):
    recipe = make_recipe({"target": "64x"})
    made = make_plan(info, recipe)
    estimate = estimate_plan(made, info, recipe, parse_gpus("2x40GB"))
    assert estimate.memory == Memory(40 * 10**9, 2)
    for stage in made.stages:
        assert (estimate.seconds(stage) > 0) == (stage.tokens > 0)


@pytest.mark.parametrize("wrong", ["lots", "inf", "8x", "0x80GB", "-8x80GB", "0"])
def test_gpus_are_amounts_of_memory(wrong):
    with pytest.raises(ValueError, match=f"gpus is {wrong!r}"):
        parse_gpus(wrong)


def test_a_price_for_gpus_is_theirs_on_a_machine_without_one(info, monkeypatch):
    """At the speed of an H100, where this machine has no GPU."""
    monkeypatch.setattr("longrope.pipeline.estimate.find_device", lambda _: torch.device("cpu"))
    recipe = make_recipe({"target": "64x", "execution": {"offload_activations": "cpu"}})
    here = estimate_plan(make_plan(info, recipe, on_cpu=True), info, recipe)
    one, eight = (
        estimate_plan(make_plan(info, recipe), info, recipe, parse_gpus(gpus))
        for gpus in ("80GB", "8x80GB")
    )
    assert one.plan["search"].memory < here.plan["search"].memory
    assert one.rates == eight.rates == H100
    training, search = one.plan["finetune"], one.plan["search"]
    assert one.seconds(training) == training.linear / 4.2e14 + training.attention / 5.8e14
    assert eight.seconds(training) == one.seconds(training) / 8
    assert eight.seconds(search) == one.seconds(search)
    shown = [[str(column.header) for column in made.table().columns] for made in (here, one, eight)]
    assert shown[1] == [*shown[0][:-1], "offloaded", shown[0][-1]]
    assert [heads[4] for heads in shown] == ["memory", "memory", "each GPU's memory"]


def test_every_stage_that_does_not_fit_is_named(info):
    made = plan(info, target="64x", finetune={"final": {"steps": 3}})
    with pytest.raises(
        ValueError, match=r"^search at .*; finetune at .*; final-finetune at "
    ) as error:
        check_memory(made.stages, Memory(10**6))
    assert "`set` finetune.sequence_length=1024" in str(error.value)


def test_where_bfloat16_is_slow_it_is_said(info, monkeypatch):
    """As on a CPU without instructions for it."""

    def calibrated(info, device, dtype):
        return Rates(1e9 if dtype == torch.bfloat16 else 1e11, 1e11)

    monkeypatch.setattr("longrope.pipeline.estimate.calibrate", calibrated)
    content = {"execution": {"dtype": "bfloat16"}, "finetune": {"precision": "bf16"}}
    recipe = make_recipe({"target": "64x"} | content)
    (found,) = estimate_plan(make_plan(info, recipe), info, recipe).notes
    assert "100 times" in found
    assert "--set execution.dtype=float32 --set finetune.precision=float32" in found
    exact = make_recipe({"target": "8x", "execution": {"dtype": "float32"}})
    assert not estimate_plan(make_plan(info, exact), info, exact).notes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_grows_with_each_token_as_the_long_forward_s_does(dtype):
    """Whose own figure is held to what it allocates by test_forward."""
    loaded = load_model("bundled", ExecutionConfig(dtype=dtype))
    recipe = make_recipe(
        {
            "target": "8x",
            "execution": {"dtype": dtype},
            "search": {"algorithm": "evolution"},
        }
    )
    cost = Costs(loaded.info, recipe, on_cpu=True)
    near, far = (cost.search("search", length).memory for length in (4096, 8192))
    assert far - near == 4096 * loaded.forward().bytes_per_token()


def test_hidden_states_wait_on_the_host_of_a_gpu_alone(info):
    def search(on_cpu, **changes):
        recipe = make_recipe({"target": "8x", "execution": changes})
        return Costs(info, recipe, on_cpu).search("search", 2048)

    here, there = search(False), search(False, offload_activations="cpu")
    assert there.host == here.memory - there.memory > 0
    assert here.host == 0
    check_memory([there], Memory(10**9))
    with pytest.raises(
        ValueError, match=r"search at 2,048 .* host's .*offload_activations=DIRECTORY"
    ):
        check_memory([there], Memory(10**9, host=there.host - 1))
    on_cpu = search(True), search(True, offload_activations="cpu")
    assert on_cpu[0].memory == on_cpu[1].memory
    assert on_cpu[1].host == 0


def test_what_helps_is_what_is_not_done_yet(info):
    def helps(on_cpu, search=None, **execution):
        recipe = make_recipe({"target": "8x", "execution": execution, "search": search or {}})
        return Costs(info, recipe, on_cpu).search("search", 2048).helps

    assert helps(False) == (
        "search.algorithm=evolution",
        "execution.offload_activations=cpu",
        "execution.offload_weights=true",
        "execution.chunk_size=2048",
    )
    assert helps(True, offload_weights=True) == (
        "search.algorithm=evolution",
        "execution.offload_activations=DIRECTORY",
    )
    done = {"offload_activations": "cpu", "offload_weights": True, "chunk_size": 2048}
    assert helps(False, {"algorithm": "evolution"}, **done) == ()


def test_a_group_shares_hidden_states(info):
    recipe = make_recipe({"target": "8x", "search": {"algorithm": "evolution"}})
    one, four = (
        Costs(info, recipe, True, group_size).search("search", 2048) for group_size in (1, 4)
    )
    assert one.memory - four.memory == 2048 * info.hidden_size * 4 * 3 // 4
    recipe = make_recipe(
        {"target": "8x", "execution": {"chunk_size": 512, "offload_activations": "cpu"}}
    )
    one, four = (
        Costs(info, recipe, False, group_size).search("search", 2048) for group_size in (1, 4)
    )
    assert four.host == one.host / 4
    assert four.memory <= one.memory


def test_training_is_spread_over_processes_where_it_is_sharded(monkeypatch):
    """The same figures that a GPU would give: no process is asked for what another has."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 2 * 10**9))
    gpu = torch.device("cuda:1")
    assert available(gpu, 8).devices == 1
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert (available(gpu, 8).each, available(gpu, 8).devices) == (10**9, 8)
    assert available(torch.device("cpu"), 8).devices == 1


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    alone = available(torch.device("cpu")).each
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available(torch.device("cpu")).each == pytest.approx(alone / 4, rel=0.2)


LLAMA2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32_000,
}
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("shape", "length", "measured"),
    [
        (LLAMA2_7B, 131_072, 17.54e9),
        (LLAMA2_7B, 262_144, 20.83e9),
        (LLAMA2_7B, 524_288, 27.41e9),
        (LLAMA2_7B | {"num_hidden_layers": 2}, 2_097_152, 54.76e9),
        (SMOLLM2, 131_072, 3.14e9),
    ],
)
def test_memory_is_what_an_h100_took(tmp_path, shape, length, measured):
    """benchmarks/results: long-forward-h100, and long-forward-llama2-7b-h200 for the longest."""
    names = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    transformers.LlamaConfig(**shape, **names).save_pretrained(tmp_path)
    costs = Costs(inspect_model(str(tmp_path)), make_recipe({"target": "8x"}), on_cpu=False)
    assert costs.forwards("evaluate", "evaluate", length, 1).memory == pytest.approx(measured, 0.02)


def test_training_without_a_fused_attention_counts_a_block_of_scores(checkpoints):
    """GPT-OSS: transformers makes all scores of a piece, a terabyte of 32k."""
    info = inspect_model(str(checkpoints("gpt_oss")))
    assert info.explicit_scores
    assert not inspect_model("bundled").explicit_scores
    wide = dataclasses.replace(info, heads=64, layers=24, hidden_size=2880)
    recipe = make_recipe({"target": "32k", "finetune": {"precision": "bf16"}})
    stage = Costs(wide, recipe, on_cpu=False).training("finetune", 10, 32_768)
    fused = dataclasses.replace(wide, explicit_scores=False, sliding_layers=0, sliding_window=None)
    less = Costs(fused, recipe, on_cpu=False).training("finetune", 10, 32_768)
    assert stage.memory - less.memory == 64 * 2048 * 1024 * 28
    check_memory([stage], Memory(int(8e10)))
    # Under windows of 24 tokens alone fewer are made at once, and none where a window sees all.
    sliding = dataclasses.replace(fused, sliding_layers=12, sliding_window=24)
    windowed = Costs(sliding, recipe, on_cpu=False).training("finetune", 10, 32_768)
    assert windowed.memory - less.memory == 64 * 512 * 1024 * 28
    far = dataclasses.replace(sliding, sliding_window=32_768)
    assert Costs(far, recipe, on_cpu=False).training("finetune", 10, 32_768).memory == less.memory
