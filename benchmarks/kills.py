"""A run killed in every stage that keeps something as it goes, the same command each time.

Is the result the same? (What a stage writes at its end alone is there or not: nothing to kill.)

    longrope extend --out runs/whole
    python benchmarks/kills.py runs/whole --out runs/killed
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import record

KEPT = ("rescale.json", "short.json", "model/model.safetensors")


def killed_in(whole: Path, out: Path, stage: str, command: list[str]) -> bool:
    """Kill a run once half of a stage's time has passed in it; whether it was still in it."""
    half = json.loads((whole / stage / "done.json").read_text())["seconds"] / 2
    done = out / stage / "done.json"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / stage).exists() and process.poll() is None:
        time.sleep(0.002)
    until = time.monotonic() + half
    while time.monotonic() < until and not done.exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return (out / stage).exists() and not done.exists()


def results(run: Path) -> dict[str, Any]:
    """What was measured, and what each stage counted."""
    found = json.loads((run / "results.json").read_text())
    for stage in found["stages"]:
        del stage["seconds"]
    return {name: found[name] for name in ("perplexity", "passkey", "recovery", "stages")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("whole", type=Path, help="A run that nothing interrupted.")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    recipe = args.whole / "recipe.yaml"
    command = [sys.executable, "-m", "longrope", "extend", "--recipe", str(recipe)]
    command += ["--out", str(args.out)]
    done = sorted(args.whole.glob("*/done.json"), key=lambda file: file.stat().st_mtime_ns)
    planned = [file.parent.name for file in done]
    rows: list[dict[str, Any]] = []
    for stage in planned:
        rows.append({"stage": stage, "killed": killed_in(args.whole, args.out, stage, command)})
        print(rows[-1], flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows.append({"results": results(args.out) == results(args.whole)})
    for name in KEPT:
        same = (args.out / name).read_bytes() == (args.whole / name).read_bytes()
        rows.append({"file": name, "same": same})
    logs = (*args.whole.glob("*/loss.jsonl"), *args.whole.glob("*/history.jsonl"))
    for log in sorted(logs):
        name = log.relative_to(args.whole)
        same = (args.out / name).read_bytes() == log.read_bytes()
        rows.append({"file": str(name), "same": same})
    for row in rows[len(planned) :]:
        print(row)
    print(record.write("kills", vars(args), rows))


if __name__ == "__main__":
    main()
