"""Which exports of transformers 5's architectures transformers 4 loads and applies.

    python -m venv v4 && v4/bin/pip install 'transformers<5' torch accelerate
    python benchmarks/architectures_legacy.py --python v4/bin/python

A micro-model of each kind (benchmarks/architectures.py) is extended from 64 tokens to 512 and
exported. Under the other version's Python its logits after 64 and 200 tokens, within and beyond
the boundary, are compared with our own, and with those of the unscaled model. `attention` is the
attention factor of the export: `default` is the one that version 4 computes for the lengths. The
unscaled model, as transformers 5 writes it, is the control: where version 4 computes other logits
from that too, a wrong export shows nothing.
"""

import argparse
import json
import logging
import math
import subprocess
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import record
import torch
import transformers
from architectures import KINDS, ORIGINAL, TARGET, make, plain

from longrope import load_model
from longrope.checkpoints.hf import export_model
from longrope.checkpoints.manifest import Manifest
from longrope.execution import ExecutionConfig
from longrope.rope.apply import rescaled
from longrope.rope.pair import RescalePair
from longrope.rope.rescale import default_attention_factor

LENGTHS = (ORIGINAL, 200)
TOLERANCE, COMPARABLE = 1e-3, 0.1  # of a logit: an export's, and the control's
CONTROL = "unscaled"
ATTENTION = {"default": default_attention_factor(ORIGINAL, TARGET), "other": 1.2}

# Run under the other version: prints a line of JSON for each directory.
THEIRS = """
import json, sys, torch, transformers
from pathlib import Path
transformers.logging.set_verbosity_error()
for directory in sorted(Path(sys.argv[1]).iterdir()):
    question = json.loads((directory / "question.json").read_text())
    answer = {"directory": directory.name, "version": transformers.__version__}
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
        auto = transformers.AutoModelForImageTextToText
        if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            auto = transformers.AutoModelForCausalLM
        model = auto.from_pretrained(directory, torch_dtype=torch.float32).eval()
        with torch.no_grad():
            answer["logits"] = [
                model(torch.tensor([question["ids"][:n]]), use_cache=False).logits[0, -1].tolist()
                for n in question["lengths"]
            ]
    except Exception as error:
        answer["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    print(json.dumps(answer), flush=True)
"""


def write_exports(kind: str, out: Path) -> dict[str, Any]:
    """Export a kind's micro-model with both attention factors; return its own last logits."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as source:
        if make(kind, Path(source)):
            return found
        how: dict[str, Any] = {"rope_scaling": "replace", "original_length": ORIGINAL}
        try:
            loaded = load_model(source, ExecutionConfig(dtype="float32"), **how)
        except ValueError:  # it cannot be extended
            return found
        ids = torch.randint(3, 1500, (1, 200), generator=torch.Generator().manual_seed(0))
        info = loaded.info
        question = json.dumps({"ids": ids[0].tolist(), "lengths": LENGTHS})
        unscaled = [plain(loaded.model, ids[:, :tokens])[0, -1] for tokens in LENGTHS]
        control = out / f"{kind}.{CONTROL}"
        loaded.model.save_pretrained(control)
        (control / "question.json").write_text(question)
        found[control.name] = unscaled, unscaled
        for name, factor in ATTENTION.items():
            pair = RescalePair(
                info.rescale("ntk", ORIGINAL).replace(attention_factor=factor),
                info.rescale("yarn", TARGET).replace(attention_factor=factor),
            )
            directory = out / f"{kind}.{name}"
            export_model(loaded, Manifest("hf", "micro", pair), directory)
            (directory / "question.json").write_text(question)
            ours = []
            for tokens in LENGTHS:
                with rescaled(loaded.model, pair.choose(tokens)):
                    ours.append(plain(loaded.model, ids[:, :tokens])[0, -1])
            found[directory.name] = ours, unscaled
    return found


def off(answer: dict[str, Any], expected: list[Any]) -> float:
    """Return the largest difference of a logit."""
    pairs = zip(answer["logits"], expected, strict=True)
    return max((torch.tensor(theirs) - ours).abs().max().item() for theirs, ours in pairs)


def verdicts(answers: dict[str, Any], expected: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare the other version's logits with ours: right, unscaled, wrong or not loaded."""
    rows = []
    for name, (ours, unscaled) in expected.items():
        kind, _, attention = name.partition(".")
        answer, control = answers[name], answers[f"{kind}.{CONTROL}"]
        row = {"kind": kind, "attention": attention, "transformers": answer["version"]}
        control_off = math.inf if "error" in control else off(control, unscaled)
        comparable = control_off < COMPARABLE
        tolerance = max(TOLERANCE, 5 * control_off if comparable else 0.0)
        if "error" in answer:
            row |= {"verdict": "not loaded" if comparable else "control fails"}
            row |= {"error": answer["error"]}
        else:
            row |= {"control_off": control_off, "off": off(answer, ours)}
            if row["off"] < tolerance:
                row["verdict"] = "right"
            elif not comparable:
                row["verdict"] = "control fails"
            else:
                is_unscaled = off(answer, unscaled) < tolerance
                row["verdict"] = "unscaled" if is_unscaled else "wrong"
        if attention != CONTROL:
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND")
    parser.add_argument("--python", required=True, help="Python with the other version.")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("longrope").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as directory:
        expected: dict[str, Any] = {}
        for kind in args.kinds or KINDS:
            expected |= write_exports(kind, Path(directory))
        command = [args.python, "-c", THEIRS, directory]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    answers = map(json.loads, done.stdout.splitlines())
    rows = verdicts({answer["directory"]: answer for answer in answers}, expected)
    for row in rows:
        print(json.dumps(row))
    print(Counter((row["attention"], row["verdict"]) for row in rows))
    if not args.kinds:
        print(record.write("architectures-legacy", {"tolerance": TOLERANCE} | vars(args), rows))


if __name__ == "__main__":
    main()
