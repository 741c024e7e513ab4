"""Asks mlx-lm for log-probabilities; run by any Python that has it, without longrope.

python query_mlx.py QUESTION.json ANSWER.json
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

STEP = 1024


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        question = json.load(file)
    import mlx.core as mx  # pyright: ignore[reportMissingImports]
    from mlx_lm.utils import load_model  # pyright: ignore[reportMissingImports]

    model = load_model(Path(question["path"]))[0]
    model.set_dtype(getattr(mx, question["dtype"]))
    answers = [next_token(model, ids, question["top"]) for ids in question["prompts"]]
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump({"answers": answers, "version": f"mlx-lm {version('mlx-lm')}"}, file)


def next_token(model: Any, ids: list[int], top: int) -> dict[str, float]:
    """Token id → log-probability of being the next, the likeliest ones.

    In steps, as mlx-lm's own generation takes a prompt: whole, its scores would not fit.
    """
    import mlx.core as mx  # pyright: ignore[reportMissingImports]
    from mlx_lm.models.cache import make_prompt_cache  # pyright: ignore[reportMissingImports]

    cache, last = make_prompt_cache(model), len(ids) - 1
    for start in range(0, last, STEP):
        model(mx.array([ids[start : min(start + STEP, last)]]), cache=cache)
        mx.eval([layer.state for layer in cache])
    logits = model(mx.array([ids[last:]]), cache=cache)[0, -1].astype(mx.float32)
    found = logits - mx.logsumexp(logits)
    best = mx.argsort(-found)[:top].tolist()
    return {str(i): found[i].item() for i in best}


if __name__ == "__main__":
    main()
