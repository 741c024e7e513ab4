"""A run killed with -9 in every stage, the same command each time: is the result the same?

    longrope extend --out runs/whole
    python benchmarks/kills.py runs/whole --out runs/killed

On as many threads as the other run had, since sums depend on them in their last digits.
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


def killed_in(
    whole: Path, out: Path, stage: str, before: str | None, command: list[str]
) -> dict[str, Any]:
    """Kill a run once half of a stage's time has passed in it; whether it was still in it.

    A stage begins where the one before it, killed by itself and resumed here, is done.
    """
    half = json.loads((whole / stage / "done.json").read_text())["seconds"] / 2
    done, begun = out / stage / "done.json", out / (f"{before}/done.json" if before else stage)
    if begun.exists():  # it was over before it was killed: this one's beginning is not to be seen
        raise SystemExit(f"{before} was done too soon; begin again with another --out")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not begun.exists() and process.poll() is None:
        time.sleep(0.001)
    since = time.monotonic()
    while time.monotonic() < since + half and not done.exists() and process.poll() is None:
        time.sleep(0.001)
    alive = process.poll() is None and begun.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    return {"stage": stage, "killed_in_it": alive and not done.exists(), "after_s": half}


def results(run: Path) -> dict[str, Any]:
    """What was measured, and what each stage counted."""
    found = json.loads((run / "results.json").read_text())
    for stage in found["stages"]:
        del stage["seconds"]
    return {name: found[name] for name in ("perplexity", "passkey", "recovery", "stages")}


def content(run: Path, name: str | Path) -> bytes:
    """A file's, but for the run's own path, which says where its model came from."""
    return (run / name).read_bytes().replace(str(run.resolve()).encode(), b"RUN")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("whole", type=Path, help="A run that nothing interrupted.")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} is there already: give another --out")
    recipe = args.whole / "recipe.yaml"
    command = [sys.executable, "-m", "longrope", "extend", "--recipe", str(recipe)]
    command += ["--out", str(args.out)]
    done = sorted(args.whole.glob("*/done.json"), key=lambda file: file.stat().st_mtime_ns)
    planned = [file.parent.name for file in done]
    rows: list[dict[str, Any]] = []
    for before, stage in zip([None, *planned], planned, strict=False):
        rows.append(killed_in(args.whole, args.out, stage, before, command))
        print(rows[-1], flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows.append({"results": results(args.out) == results(args.whole)})
    logs = (*args.whole.glob("*/loss.jsonl"), *args.whole.glob("*/history.jsonl"))
    for name in (*KEPT, *sorted(log.relative_to(args.whole) for log in logs)):
        same = content(args.out, name) == content(args.whole, name)
        rows.append({"file": str(name), "same": same})
    for row in rows[len(planned) :]:
        print(row)
    print(record.write("kills", vars(args), rows))


if __name__ == "__main__":
    main()
