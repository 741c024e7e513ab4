"""A generation that crosses the boundary: cached against uncached, and transformers' own.

    python benchmarks/crossing.py

Micro-models of four families with random weights, in float32: the largest difference of a logit
between generating with a key-value cache and without one, over twelve tokens around the boundary.
The second column is the same for transformers' own ``longrope`` config with the same factors.
"""

import copy
import sys
from pathlib import Path

import record
import torch
from transformers import AutoModelForCausalLM

from longrope.rope.switch import switched

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from conftest import FAMILIES, RECOVERY, micro_model, pair

FAMILY_NAMES = ("llama", "mistral", "qwen2", "phi3")


def difference(model) -> float:
    prompt = torch.randint(3, 1500, (1, RECOVERY - 5), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "eos_token_id": None, "pad_token_id": 2}
    options |= {"attention_mask": torch.ones_like(prompt)}
    cached = model.generate(prompt, **options)
    # The same tokens without a cache: what every logit should be.
    worst = 0.0
    for step, logits in enumerate(cached.logits):
        ids = cached.sequences[:, : prompt.shape[1] + step]
        with torch.no_grad():
            plain = model(input_ids=ids, use_cache=False).logits[:, -1]
        worst = max(worst, (logits - plain).abs().max().item())
    return worst


def main() -> None:
    rows = []
    print("| family | longrope's switch | transformers' own |\n|---|---|---|")
    for name in FAMILY_NAMES:
        model = micro_model(FAMILIES[name]())
        both = pair(model)
        with switched(model, both):
            ours = difference(model)
        config = copy.deepcopy(model.config)
        config.rope_parameters = {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": list(both.short.factors),
            "long_factor": list(both.long.factors),
            "original_max_position_embeddings": RECOVERY,
            "attention_factor": 1.1,
        }
        config.max_position_embeddings = 512
        theirs = AutoModelForCausalLM.from_config(config).eval()
        theirs.load_state_dict(model.state_dict())
        rows.append({"family": name, "longrope": ours, "transformers": difference(theirs)})
        print(f"| {name} | {ours:.1e} | {rows[-1]['transformers']:.1e} |")
    print(record.write("crossing", {"families": list(FAMILY_NAMES), "new_tokens": 12}, rows))


if __name__ == "__main__":
    main()
