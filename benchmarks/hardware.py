"""Which models fit which GPU, what is changed to fit, and the hours: docs/reference/hardware.md.

    python benchmarks/hardware.py

Calls the planner with ``--effort standard`` on configurations with the shapes of Llama models and
an original length of 8,192 tokens. Reads no weights and needs no GPU. Hours are those of one H100.
"""

import tempfile
from pathlib import Path

import transformers

from longrope.models.info import ModelInfo, inspect_model
from longrope.pipeline.effort import Situation, apply_choices, choose_settings
from longrope.pipeline.estimate import H100, Estimate, Memory, parse_gpus, problem
from longrope.pipeline.plan import make_plan
from longrope.pipeline.recipe import make_recipe
from longrope.units import duration, gigabytes

ORIGINAL = 8192
# Hidden size, intermediate size, layers, heads, key heads, tied embeddings.
SHAPES = {
    "1B (Llama-3.2-1B)": (2048, 8192, 16, 32, 8, True),
    "3B (Llama-3.2-3B)": (3072, 8192, 28, 24, 8, True),
    "8B (Llama-3.1-8B)": (4096, 14_336, 32, 32, 8, False),
    "70B (Llama-3-70B)": (8192, 28_672, 80, 64, 8, False),
}
TARGETS = {"64k": "8×, without training", "128k": "16×, with training"}
GPUS = ("24GB", "48GB", "80GB")
# These follow the length of the training sequences.
FOLLOWS = tuple(
    f"finetune.{key}" for key in ("batch", "micro_batch", "steps", "final.steps", "warmup")
)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        models = {name: model(Path(directory) / name[:3].strip(), *SHAPES[name]) for name in SHAPES}
        for target, title in TARGETS.items():
            print(f"### {target} ({title})\n")
            print("| model | GPU | fits | changed to fit | host memory | time on one H100 |")
            print("|---|---|---|---|---|---|")
            for name, info in models.items():
                for gpu in GPUS:
                    print(
                        f"| {name} | {gpu[:-2]} GB | " + " | ".join(row(info, target, gpu)) + " |"
                    )
            print()


def model(
    directory: Path, hidden: int, intermediate: int, layers: int, heads: int, keys: int, tied: bool
) -> ModelInfo:
    """Return the properties of a model with these shapes, from a config without weights."""
    transformers.LlamaConfig(
        vocab_size=128_256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=64 if hidden == 2048 else 128,
        max_position_embeddings=ORIGINAL,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=tied,
        dtype="bfloat16",
    ).save_pretrained(directory)
    return inspect_model(str(directory))


def row(info: ModelInfo, target: str, gpu: str) -> tuple[str, ...]:
    """Return what a table says of a model, a target and a GPU."""
    memory = parse_gpus(gpu)
    recipe = make_recipe({"target": target})
    plenty = {c.key: c.value for c in choose_settings(recipe, info, Situation(Memory(10**15)))}
    choices = choose_settings(recipe, info, Situation(memory))
    changed = [
        f"`{c.key}={shown(c.value)}`"
        for c in choices
        if plenty.get(c.key) != c.value and c.key not in FOLLOWS
    ]
    chosen = apply_choices(recipe, choices)
    plan = make_plan(info, chosen)
    estimate = Estimate(plan, H100, H100, memory)
    too_large = [stage for stage in plan.stages if problem(stage, memory)]
    if too_large:
        worst = max(too_large, key=lambda stage: stage.memory)
        return f"no: {worst.name} takes {gigabytes(worst.memory)}", "", "", ""
    host = max(stage.host for stage in plan.stages)
    seconds = sum(map(estimate.seconds, plan.stages))
    return "yes", " ".join(changed), gigabytes(host) if host else "", duration(seconds)


def shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    main()
