"""What start tokens (n̂) give: perplexity of PI, NTK and YaRN with each n̂, held out.

The LongRoPE paper's table 2 in miniature.

    python benchmarks/start_tokens.py --data python-library-held-out --lengths 512,1024,2048
    python benchmarks/start_tokens.py --model smollm2 --dtype bfloat16 --lengths 16384 \
        --data texts/austen-emma.txt --data texts/austen-persuasion.txt \
        --start-tokens 0,1,4,16,64 --tokens-per-document 16384
"""

import argparse
from pathlib import Path

import record
from smollm2 import model_path

from longrope.data.encoding import bos_tokens
from longrope.data.windows import load_documents
from longrope.evaluate.perplexity import paired_difference, score
from longrope.execution import ExecutionConfig
from longrope.layerwise.forward import LongForward
from longrope.models.load import load_model
from longrope.models.target_length import starting_point
from longrope.rope.apply import rescaled
from longrope.search.space import START_TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--lengths", default="512,1024,2048")
    parser.add_argument("--methods", default="pi,ntk,yarn")
    parser.add_argument("--start-tokens", default=",".join(map(str, START_TOKENS)))
    parser.add_argument("--tokens-per-document", type=int, default=8192)
    args = parser.parse_args()

    loaded = load_model(model_path(args.model), ExecutionConfig(dtype=args.dtype))
    documents = load_documents(loaded.tokenizer, args.data)
    bos = bos_tokens(loaded.tokenizer)
    forward = LongForward(loaded.model)
    rows = []
    for length in map(int, args.lengths.split(",")):
        shared = starting_point(loaded.info, length, None).attention_factor
        for method in args.methods.split(","):
            base = loaded.info.rescale(method, length).replace(attention_factor=shared)
            scores = {}
            for tokens in map(int, args.start_tokens.split(",")):
                with rescaled(loaded.model, base.replace(start_tokens=tokens)):
                    scores[tokens] = score(
                        forward,
                        documents,
                        length,
                        bos=bos,
                        tokens_per_document=args.tokens_per_document,
                    )
                difference = paired_difference(scores[tokens], scores[0])
                rows.append(
                    {
                        "length": length,
                        "method": method,
                        "start_tokens": tokens,
                        "perplexity": scores[tokens].perplexity,
                        "difference_nats": difference.mean,
                        "standard_error": difference.standard_error,
                        "better": difference.better,
                    }
                )
            own = [row for row in rows if (row["length"], row["method"]) == (length, method)]
            best = min(own, key=lambda row: row["perplexity"])
            line = " ".join(f"{row['start_tokens']}:{row['perplexity']:.2f}" for row in own)
            print(f"{length} {method} best n̂ {best['start_tokens']} — {line}", flush=True)
    config = vars(args) | {"documents": [document.name for document in documents]}
    print(record.write(f"start-tokens-{Path(args.model).name}", config, rows))


if __name__ == "__main__":
    main()
