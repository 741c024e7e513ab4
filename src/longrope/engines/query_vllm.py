"""Query vLLM for log-probabilities; does not need longrope.

python query_vllm.py QUESTION.json ANSWER.json
"""

import json
import os
import sys
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, no open port


def main() -> None:
    """Read the question, query vLLM, write the answer."""
    with open(sys.argv[1], encoding="utf-8") as file:
        question = json.load(file)
    import vllm  # pyright: ignore[reportMissingImports]

    engine = vllm.LLM(
        question["path"],
        skip_tokenizer_init=True,
        dtype=question["dtype"],
        max_model_len=question["context"],
        max_logprobs=question["top"],
        max_num_seqs=1,
        enforce_eager=True,
        enable_prefix_caching=False,
        gpu_memory_utilization=question.get("memory", 0.5),
    )
    settings = vllm.SamplingParams(
        max_tokens=1, temperature=0.0, logprobs=question["top"], detokenize=False
    )
    answers = [next_token(engine, ids, settings) for ids in question["prompts"]]
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump({"answers": answers, "version": f"vllm {vllm.__version__}"}, file)


def next_token(engine: Any, ids: list[int], settings: Any) -> dict[str, float]:
    """Return vLLM's log-probabilities of the likeliest next tokens by token id, in nats."""
    found = engine.generate([{"prompt_token_ids": ids}], settings, use_tqdm=False)
    return {str(i): p.logprob for i, p in found[0].outputs[0].logprobs[0].items()}


if __name__ == "__main__":
    main()
