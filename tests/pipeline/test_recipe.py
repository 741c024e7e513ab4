"""The recipes that longrope carries: each runs whole in miniature, and is priced at true size."""

import pytest
import torch
import transformers
import yaml

from longrope.models.bundled import BUNDLED
from longrope.models.info import inspect_model
from longrope.pipeline.plan import make_plan
from longrope.pipeline.recipe import RECIPES, load_recipe, make_recipe, resolve_recipe
from program import succeeds

SHAPES = {
    "llama2-7b": lambda: transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    ),
    "mistral-7b": lambda: transformers.MistralConfig(
        vocab_size=32_768,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32_768,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "bundled": lambda: transformers.AutoConfig.from_pretrained(BUNDLED),
    "bundled-512x": lambda: transformers.AutoConfig.from_pretrained(BUNDLED),
}
SMALL = {"population": 4, "mutations": 1, "crossovers": 1, "iterations": 1, "parents": 2}


def tiny(name: str):
    """Two layers of the architecture, a window of 64 tokens."""
    config = SHAPES[name]()
    heads = 4 if config.num_key_value_heads != config.num_attention_heads else 2
    changes = {
        "vocab_size": 1536,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": 64 // heads,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "execution": {"dtype": "float32"},
    }
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def scaled_down(name: str, model: str, data: str) -> dict:
    """The recipe with its lengths divided so that the original is 64 tokens, and little work."""
    content = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    content |= {"model": model, "data": [data], "execution": {"dtype": "float32"}, "target": "16x"}
    for section in ("search", "second_search", "recovery"):
        given = content.get(section, {})
        small = SMALL if given.get("algorithm") == "evolution" else {}
        content[section] = {**given, **small, "windows": 1, "budget": 5}
    tuning = content.setdefault("finetune", {})
    tuning |= {"steps": 2, "batch": 2, "micro_batch": 1, "warmup": 1, "precision": "float32"}
    if "through" in tuning:
        tuning |= {"through": "96", "through_steps": 2}
    if "final" in tuning:
        tuning["final"] = {"steps": 2, "sequence_length": "96"}
    if "sequence_length" in tuning:
        tuning["sequence_length"] = "128"
    content["evaluate"] = {"documents": 1, "methods": ["none"], "lengths": ["64", "128", "1024"]}
    return content


def test_every_recipe_is_here():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(SHAPES)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_runs_end_to_end_on_two_layers(name, texts, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny(name))
    checkpoint, out = tmp_path / "model", tmp_path / "out"
    model.save_pretrained(checkpoint)
    for file in BUNDLED.glob("tokenizer*"):
        (checkpoint / file.name).write_bytes(file.read_bytes())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(scaled_down(name, str(checkpoint), str(texts))))
    succeeds("extend", "--recipe", recipe, "--out", out)
    for file in ("results.json", "report.html", "report.md", "model/config.json", "short.json"):
        assert (out / file).exists()


@pytest.mark.parametrize("name", list(SHAPES))
def test_is_priced_at_its_true_shape(name, tmp_path):
    """From the config alone: no weights of the true size anywhere."""
    SHAPES[name]().save_pretrained(tmp_path)
    recipe = load_recipe(name, model=str(tmp_path))
    info = inspect_model(str(tmp_path), original_length=recipe.original_length)
    plan = make_plan(info, recipe)
    sizes = {"llama2-7b": 6.74e9, "mistral-7b": 7.25e9}
    assert info.parameters == pytest.approx(sizes.get(name, 2.5e6), rel=0.01)
    assert plan["second-search"].length == plan.target == 8 * plan["finetune"].length
    for stage in plan.stages:
        assert (stage.linear > 0) == (stage.tokens > 0)
    if name == "llama2-7b":
        assert (plan.original, plan.trained, plan.target) == (4096, 262_144, 2_097_152)
        assert plan["through-finetune"].tokens == 400 * 32 * 131_072
        # 16 bytes a parameter of weights, gradients and moments; states of 32 layers besides
        assert 108e9 < plan["through-finetune"].memory < 220e9
        assert plan["second-search"].memory < 80e9


def test_the_command_line_goes_before_the_file(tmp_path):
    assert resolve_recipe(None, None).model == "bundled"
    assert resolve_recipe(None, "bundled", target="8x").data == ("python-library",)
    for target in ("512x", "131072", "128k"):
        assert resolve_recipe(None, None, target=target).finetune.through == "2k"
    recipe = resolve_recipe("bundled", None, target="16x", seed=3, finetune={"enabled": False})
    assert (recipe.target, recipe.seed, recipe.finetune.enabled) == ("16x", 3, False)
    assert resolve_recipe(None, "some/model", target="8x").finetune.learning_rate == 2e-5
    assert resolve_recipe("bundled", None, finetune={"lora": 8}).finetune.lora == 8
    with pytest.raises(ValueError, match=r"finetune\.lora is 0"):
        resolve_recipe("bundled", None, finetune={"lora": 0})
    with pytest.raises(ValueError, match="target is missing"):
        resolve_recipe(None, "some/model")


def aliases(depth: int, start: str, use: str) -> str:
    """A recipe whose nested aliases stand for 9 ** depth values."""
    levels = [f"a0: &a0 [{', '.join('x' * 9)}]"]
    for n in range(1, depth):
        inner = ", ".join(f"*a{n - 1}" for _ in range(9))
        levels.append(f"a{n}: &a{n} [{inner}]")
    return "\n".join([start, *levels, use.format(depth - 1)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (aliases(9, "target: 8x", "data: *a{}"), "recipe=.*aliases stand for more than 10,000"),
        (aliases(300, "target: 8x", "model: *a{}"), "recipe=.*aliases stand for more than 10,000"),
        ("target: 8x\ndata: &a [*a]", "recipe=.*aliases stand for more than 10,000"),
        ("target: " + "[" * 5000 + "]" * 5000, "recipe=.*nested too deeply"),
        ("target: [8x", "recipe=.*valid YAML"),
        ("target: 8x\nseed: 1\ntarget: 4x", "'target' .*line 3"),
        ("target: 8x\nsearch: {windows: 1, windows: 2}", "'windows' .*line 2"),
        ("- target", "recipe=.* mapping"),
        ("target: 8x\nfinetune: {stesp: 3}", "no key 'finetune.stesp'"),
        ("target: 8x\nexecution: {chunk_size: 0}", "execution.chunk_size is 0"),
        ("target: 8x\nfinetune: {steps: on}", "finetune.steps is True"),
        ("target: 8x\nseed: off", "seed is False"),
        ("target: 8x\nfinetune: {learning_rate: .inf}", "finetune.learning_rate is inf"),
        ("target: 8x\nfinetune: {schedule: wave}", "finetune.schedule is 'wave': .*'cosine'"),
        ("target: 8x\nmodel: !!python/object/apply:os.getcwd []", "recipe=.*valid YAML"),
    ],
)
def test_bad_files_are_one_line(tmp_path, text, message):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"recipe='nowhere': .*YAML.*bundled"):
        load_recipe("nowhere")


def test_a_recipe_survives_its_file(tmp_path):
    recipe = make_recipe({"target": "8x", "evaluate": {"lengths": ["1k"]}})
    recipe.save(tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml") == recipe


def test_an_alias_is_its_value(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(
        "target: &l 8x\ndata: &d [a.txt, b.txt]\neval_data: *d\nevaluate: {lengths: [*l]}"
    )
    recipe = load_recipe(file)
    assert recipe.eval_data == recipe.data == ("a.txt", "b.txt")
    assert recipe.evaluate.lengths == ("8x",)
    with pytest.raises(ValueError, match=r"set='data=&a \[\*a\]': its value is not valid YAML"):
        resolve_recipe(None, "m", target="8x", settings=["data=&a [*a]"])
