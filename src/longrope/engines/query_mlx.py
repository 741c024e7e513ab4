"""Query mlx-lm for log-probabilities; does not need longrope.

python query_mlx.py QUESTION.json ANSWER.json
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

STEP = 1024


def main() -> None:
    """Read the question, query mlx-lm, write the answer."""
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
    """Return mlx-lm's log-probabilities of the likeliest next tokens by token id, in nats.

    The prompt is processed in steps, as in mlx-lm's own generation: the attention scores of a
    whole prompt would not fit into memory.
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
