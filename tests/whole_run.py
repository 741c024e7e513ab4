"""A run of every stage on a model of two layers: its recipe, and how it is asked for."""

import json

import program

STAGES = [
    "search",
    "finetune",
    "second-search",
    "final-finetune",
    "recovery-1",
    "recovery-2",
    "recovery",
    "export",
    "evaluate",
    "report",
]
SMALL = {"population": 6, "mutations": 2, "crossovers": 2, "iterations": 3, "parents": 4}
RECIPE = {
    "target": "16x",
    "execution": {"dtype": "float32"},
    "search": {"windows": 2, "budget": 9, "validation_windows": 1},
    "finetune": {
        "steps": 6,
        "final": {"steps": 8},
        "batch": 2,
        "learning_rate": 1e-3,
        "precision": "float32",
        "warmup": 2,
        "save_every": 2,
        "passkey_share": 0.3,
        "short_share": 0.5,
        "distill": True,
    },
    "second_search": {"windows": 1, "transfer": "none", "algorithm": "evolution", **SMALL},
    "recovery": {"windows": 2, "budget": 9, "transfer": "none"},
    "evaluate": {
        "methods": ["none", "yarn"],
        "documents": 2,
        "lengths": ["128", "512", "1024", "64"],
        "passkey_trials": 0,
    },
}


def run(*arguments, verb="extend", code=0, ranks=1):
    done = program.run(verb, *arguments, ranks=ranks)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def evaluated(*arguments):
    return json.loads(run(*arguments, verb="evaluate").stdout)


def results(out):
    found = json.loads((out / "results.json").read_text())
    for stage in found["stages"]:
        del stage["seconds"]
    return found
