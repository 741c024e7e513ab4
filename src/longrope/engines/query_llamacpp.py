"""Query llama.cpp for log-probabilities; needs xllamacpp, not longrope.

python query_llamacpp.py QUESTION.json ANSWER.json
"""

import importlib
import json
import sys
from typing import Any


def main() -> None:
    """Read the question, query llama.cpp, write the answer."""
    with open(sys.argv[1], encoding="utf-8") as file:
        question = json.load(file)
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = question["path"]
    params.n_ctx = question["context"]
    params.n_parallel = 1  # llama.cpp compares the context of one slot
    params.n_gpu_layers = 0
    params.warmup = False
    params.fit_params = False
    params.ctx_shift = False
    server = xllamacpp.Server(params)
    top, letter = question["top"], question["letter"]
    answers = [next_token(server, ids, top, letter) for ids in question["prompts"]]
    answer = {"answers": answers, "version": f"xllamacpp {xllamacpp.__version__}"}
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(answer, file)


def next_token(server: Any, ids: list[int], top: int, letter: int) -> dict[str, float]:
    """Return llama.cpp's log-probabilities of the likeliest next tokens by token id, in nats.

    llama.cpp returns none when it chooses a token that is part of a character. So a logit bias
    makes it choose the ``letter`` token, which does not change the log-probabilities.
    """
    asked = {"prompt": ids, "n_predict": 1, "n_probs": top, "temperature": 0.0}
    asked["logit_bias"] = [[letter, 1000.0]]
    result = server.handle_completions(asked | {"cache_prompt": False})
    if "choices" not in result:
        raise SystemExit(f"llama.cpp: {result}")
    rows = result["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {str(row["id"]): row["logprob"] for row in rows}


if __name__ == "__main__":
    main()
