"""Record how long the steps of a run take, for the test of the time that progress bars show.

    python benchmarks/step_times.py --out runs/timed

Runs the demo, and a search of the bundled model to 8x. Writes a JSON file with (cost, seconds) of
every step of each stage of at least ten seconds, which ``tests/test_progress.py`` replays.
"""

import argparse
import json
from pathlib import Path

import longrope.pipeline.evaluation
import longrope.search.evaluator
import longrope.train.trainer
from longrope.api import search_factors
from longrope.pipeline.extend import extend
from longrope.pipeline.recipe import load_recipe
from longrope.progress import seconds_left

MODULES = {
    "search": longrope.search.evaluator,
    "fine-tune": longrope.train.trainer,
    "evaluate": longrope.pipeline.evaluation,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--write", type=Path, default=Path("tests/step_times.json"))
    args = parser.parse_args()
    recorded: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in MODULES}
    for name, module in MODULES.items():

        def recording(done, left, name=name):
            stages = recorded[name]
            if done and not any(stage is done for stage in stages):
                stages.append(done)
            return seconds_left(done, left)

        module.seconds_left = recording
    extend(load_recipe("bundled", effort="quick"), args.out / "demo")
    search_factors(
        "bundled", target_length="8x", texts="python-library", output_dir=args.out / "search"
    )
    stages = [
        {"stage": name, "steps": [[cost, round(seconds, 4)] for cost, seconds in steps]}
        for name, found in recorded.items()
        for steps in found
        if sum(seconds for _, seconds in steps) >= 10
    ]
    args.write.write_text(json.dumps(stages) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
