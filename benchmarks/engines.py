"""Which factors each engine applies to an export: docs/engines.md's table.

Every engine in a virtual environment of its own, whose Python is given:

    python benchmarks/engines.py --out runs/engines --engine transformers \\
        --engine transformers-legacy=v4/bin/python --engine vllm=vllm/bin/python \\
        --engine mlx=mlx/bin/python --engine llamacpp=llamacpp/bin/python

The bundled Llama (256 tokens) is extended to 16,384 by YaRN factors, with short factors up to
512. Other models, or what ``longrope extend`` wrote (``--model RUN``):

    python benchmarks/engines.py --model smollm2 --boundary 8192 --lengths 6144,8191,8193,16383 …
"""

import argparse
import dataclasses
from pathlib import Path

import record
from smollm2 import model_path

from longrope.checkpoints.export import ExportOptions, export
from longrope.checkpoints.manifest import FORMATS
from longrope.checkpoints.run_directory import is_run
from longrope.engines.check import Reference, Verdict, advice, verify
from longrope.models.info import inspect_model
from longrope.rope.rescale import default_attention_factor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engine", action="append", required=True, help="NAME or NAME=PYTHON")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--boundary", type=int, default=512, help="Of a model that is no run.")
    parser.add_argument("--target", type=int, default=16384, help="The same.")
    parser.add_argument("--lengths", default="384,511,513,2048")
    parser.add_argument("--formats", default="hf,hf-static,gguf,gguf-static")
    parser.add_argument("--prompts", type=int, default=2)
    args = parser.parse_args()
    lengths = tuple(int(length) for length in args.lengths.split(","))
    engines = dict((*entry.split("=", 1), None)[:2] for entry in args.engine)
    args.out.mkdir(parents=True, exist_ok=True)
    print("| format | engine | " + " | ".join(f"{n:,}" for n in lengths) + " | instead |")
    print("|---|---|" + "---|" * len(lengths) + "---|", flush=True)
    computed: dict[str, dict] = {}
    rows = []
    for form in (form for form in FORMATS if form in args.formats.split(",")):
        gguf = form.startswith("gguf")
        asked = [name for name in engines if (name == "llamacpp") == gguf]
        if not asked:
            continue
        out = args.out / (f"{form}.gguf" if gguf else form)
        if not out.exists():
            export(options(args.model, args.boundary, args.target, out, form))
        reference = Reference(str(out))
        # Exports of the same weights are computed once.
        reference.computed = computed.setdefault(reference.loaded.fingerprint(), {})
        for name in asked:
            verdict = verify(
                reference, name, engine_python=engines[name], lengths=lengths, prompts=args.prompts
            )
            print(row(form, verdict), flush=True)
            rows.append({"format": form} | dataclasses.asdict(verdict))
    config = vars(args) | {"engine": list(engines)}
    print(record.write(f"engines-{Path(args.model).name}", config, rows))


def options(model: str, boundary: int, target: int, out: Path, form: str) -> ExportOptions:
    if is_run(Path(model)):
        return ExportOptions(model, out, form)  # type: ignore[arg-type]
    model = model_path(model)
    info = inspect_model(model)
    assert info.original_max_position_embeddings
    factor = default_attention_factor(info.original_max_position_embeddings, target)
    for name, length in (("short", boundary), ("long", target)):
        rescale = info.rescale("yarn", length).replace(attention_factor=factor)
        rescale.save(out.parent / f"{name}.json")
    named = {name: str(out.parent / f"{file}.json") for name, file in FILES.items()}
    return ExportOptions(model, out, form, **named)  # type: ignore[arg-type]


FILES = {"long_factors": "long", "short_factors": "short"}


def row(form: str, verdict: Verdict) -> str:
    """Applied, the largest difference from the intended factors, and from the nearest others."""
    cells = []
    for line in verdict.lines:
        others = [d for name, d in line.distances.items() if name != line.intended]
        mark = line.applied if line.right else f"**{line.applied}**"
        context = f", context {line.context:,}" if line.context else ""
        cells.append(f"{mark}{context}: {line.largest:.1e} ({min(others):.2f})")
    instead = next((text.rsplit(": ", 1)[1] for text in advice(verdict)), "")
    return f"| {form} | {verdict.version} | " + " | ".join(cells) + f" | {instead} |"


if __name__ == "__main__":
    main()
