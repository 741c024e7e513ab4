"""Questions over long texts, asked in llama.cpp: an export, and the same without its factors.

    longrope export "$SMOLLM2" --long-factors yarn --target 16k --format gguf \\
        --out runs/smollm2-16k.gguf
    python benchmarks/llamacpp_question.py runs/smollm2-16k.gguf --text runs/texts/austen-emma.txt

Without its factor tensors the file is what llama.cpp's stock converter writes for a LongRoPE
checkpoint of this architecture. Needs ``pip install xllamacpp``. Five sentences stand at five
depths of a novel, and each is asked for; the text is read once, greedy decoding.
"""

import argparse
from pathlib import Path
from typing import Any

import record
import xllamacpp
from transformers import AutoTokenizer

from longrope.checkpoints.gguf import LONG, SHORT
from longrope.checkpoints.gguf_io import read_metadata, read_tensors, require_gguf, write_file
from longrope.models.sources import read_pretrained
from longrope.progress import quiet

# Sentence up to the answer, and the answer.
FACTS = {
    "The secret password of the library is": "marmalade",
    "The treasure is buried under the old": "windmill",
    "The coach to Brighton leaves at": "7:45",
    "The colour of Harriet's new umbrella is": "turquoise",
    "The name of the Captain's ship is": "Albatross",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="What longrope export --format gguf wrote.")
    parser.add_argument("--only-without", action="store_true", help="Only without the factors.")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--lengths", default="4096,12288")
    args = parser.parse_args()
    lengths = [int(length) for length in args.lengths.split(",")]
    with quiet():
        tokenizer = read_pretrained(AutoTokenizer, str(args.model), False)
    text = args.text.read_text(encoding="utf-8")
    print("| model | " + " | ".join(f"{n:,}" for n in lengths) + " |", flush=True)
    rows = []
    bare = args.model.with_name(f"{args.model.stem}-without.gguf")
    drop_factors(args.model, bare)
    for model in [bare] if args.only_without else [args.model, bare]:
        server = serve(model, max(lengths))
        cells = []
        for length in lengths:
            story = told(tokenizer, text, length)
            found = {fact: said(server, tokenizer, story, fact) for fact in FACTS}
            right = sum(found[fact].startswith(answer) for fact, answer in FACTS.items())
            rows.append({"model": model.name, "length": length, "right": right, "answers": found})
            cells.append(f"{right} of {len(FACTS)} ({', '.join(found.values())!r})")
        print(f"| {model.name} | " + " | ".join(cells) + " |", flush=True)
    print(record.write("llamacpp-question", vars(args) | {"facts": FACTS}, rows))


def drop_factors(source: Path, path: Path) -> None:
    reader = require_gguf().GGUFReader(source)
    tensors = [t for t in read_tensors(reader) if t.name not in (LONG, SHORT)]
    write_file(path, *read_metadata(reader), tensors)


def told(tokenizer: Any, text: str, length: int) -> list[int]:
    """So many tokens of the text, a sentence in the middle of each of its parts."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    part = (length - 150) // len(FACTS)
    story: list[int] = []
    for i, (fact, answer) in enumerate(FACTS.items()):
        story += ids[i * part : (i + 1) * part - part // 2]
        story += tokenizer(f"\n\n{fact} {answer}.\n\n")["input_ids"]
        story += ids[(i + 1) * part - part // 2 : (i + 1) * part]
    return story


def said(server: Any, tokenizer: Any, story: list[int], fact: str) -> str:
    ids = story + tokenizer(f"\n\n{fact}")["input_ids"]
    asked = {"prompt": ids, "n_predict": 6, "temperature": 0.0, "cache_prompt": True}
    result = server.handle_completions(asked)
    if "choices" not in result:
        raise SystemExit(f"llama.cpp: {result}")
    return result["choices"][0]["text"].strip()


def serve(path: Path, context: int) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel = context + 64, 1
    params.warmup = params.fit_params = params.ctx_shift = False
    return xllamacpp.Server(params)


if __name__ == "__main__":
    main()
