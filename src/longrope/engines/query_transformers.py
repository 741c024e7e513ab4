"""Query transformers (4.4x to 5.x) for log-probabilities; does not need longrope.

python query_transformers.py QUESTION.json ANSWER.json
"""

import json
import sys
from typing import Any


def main() -> None:
    """Read the question, query transformers, write the answer."""
    with open(sys.argv[1], encoding="utf-8") as file:
        question = json.load(file)
    import torch
    import transformers

    path = question["path"]
    auto = auto_class(transformers, transformers.AutoConfig.from_pretrained(path))
    model = auto.from_pretrained(path, torch_dtype=getattr(torch, question["dtype"])).eval()
    answers = [next_token(model, ids, question["top"]) for ids in question["prompts"]]
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump({"answers": answers, "version": f"transformers {transformers.__version__}"}, file)


def auto_class(transformers: Any, config: Any) -> Any:
    """Return the auto class to query a model with, in transformers 4.4x to 5.x.

    Many image-text models have no causal class. The class of version 4 for these leaves audio out.
    """
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    newer = getattr(transformers, "AutoModelForMultimodalLM", None)
    return newer or transformers.AutoModelForImageTextToText


def next_token(model: Any, ids: list[int], top: int) -> dict[str, float]:
    """Return transformers' log-probabilities of the likeliest next tokens by token id, in nats."""
    import torch

    with torch.no_grad():
        hidden = model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
    found = hidden.float().log_softmax(-1).topk(top)
    return {str(i): p for i, p in zip(found.indices.tolist(), found.values.tolist())}  # noqa: B905


if __name__ == "__main__":
    main()
