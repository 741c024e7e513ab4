"""Every kind of bad input, tried on the program, with the line that it printed (Markdown).

python benchmarks/bad_input.py
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import record
import torch
import transformers
from safetensors.torch import load_file, save_file

from longrope.models.bundled import BUNDLED
from longrope.rope.rescale import Rescale


def cases(folder: Path) -> list[tuple[str, str]]:
    """(what is wrong, the command's arguments), with the files they need."""
    transformers.GPT2Config().save_pretrained(folder / "gpt2")
    shutil.copytree(BUNDLED, folder / "nan")
    tensors = load_file(folder / "nan/model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "nan/model.safetensors", metadata={"format": "pt"})
    shutil.copytree(BUNDLED, folder / "yarn")
    config = json.loads((folder / "yarn/config.json").read_text())
    config["rope_parameters"] |= {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    (folder / "yarn/config.json").write_text(json.dumps(config))
    (folder / "empty.txt").write_text("")
    (folder / "binary.bin").write_bytes(bytes(range(256)))
    (folder / "short.txt").write_text("import os\n" * 50)
    (folder / "rows.jsonl").write_text('{"body": "a text"}\n')
    Rescale((1.0,) * 16, 1e4, 256, 512).save(folder / "wrong.json")
    text = Rescale((1.0,) * 32, 1e4, 256, 512).to_json()
    (folder / "unknown.json").write_text(json.dumps(text | {"lambda": 1}))
    (folder / "layers.csv").write_text("1,2\n1,3\n")
    for name in ("run/recipe.yaml", "mine/notes.txt"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("")
    row = {"method": "none", "length": 4096}
    (folder / "compared").mkdir()
    there = {"target": 4096, "perplexity": [row]}
    (folder / "compared/compare.json").write_text(json.dumps(there))
    done = folder / "done"
    run(
        [
            "search",
            "--data",
            "python-library",
            "--target",
            "2x",
            "--windows",
            "1",
            "--algorithm",
            "evolution",
            "--budget",
            "2",
            "--out",
            str(done),
        ]
    )
    shutil.copytree(done, folder / "corrupt")
    (folder / "corrupt/state.json").write_text("{")
    text = "--data python-library"
    search, evaluate = "search --target 2x --out out", f"evaluate perplexity {text} --lengths 512"
    again = f"search {text} --target 2x --windows 1 --algorithm evolution --budget 3 --out done"
    return [
        ("no RoPE", f"search {text} gpt2 --target 2x --out out"),
        ("no such model", f"search {text} ./nowhere --target 2x --out out"),
        ("a hub id, offline", f"search {text} owner/name --target 2x --out out"),
        ("NaN weights", f"search {text} nan --target 2x --out out"),
        ("scaled already", f"search {text} yarn --target 2x --out out"),
        ("target ≤ original", f"search {text} --target 256 --out out"),
        ("target unreadable", f"search {text} --target much --out out"),
        ("missing file", f"{search} --data missing.txt"),
        ("empty document", f"{search} --data empty.txt"),
        ("binary document", f"{search} --data binary.bin"),
        ("too short", f"{search} --data short.txt"),
        ("field missing", f"{search} --data rows.jsonl"),
        ("a hub dataset, offline", f"{search} --data owner/name"),
        ("budget of nothing", f"{search} {text} --budget 0"),
        ("probability", f"{search} {text} --algorithm evolution --mutation-probability 2"),
        ("no such device", f"{search} {text} --device cuda:9"),
        ("wrong factor length", f"{evaluate} --rescale wrong.json"),
        ("unknown key", f"{evaluate} --rescale unknown.json"),
        ("rows differ per layer", f"{evaluate} --rescale layers.csv"),
        ("neither method nor file", f"{evaluate} --rescale magic"),
        ("lengths do not tile", f"evaluate perplexity {text} --lengths 512,768"),
        ("corrupt state", f"search {text} --target 2x --windows 1 --budget 4 --out corrupt"),
        ("state of another search", f"{again} --seed 1"),
        ("state of another model", again.replace("search", f"search {text} smaller", 1)),
        ("disk full on the state file", f"FULL search {text} --target 2x --windows 1 --out full"),
        ("more than the memory holds", f"evaluate perplexity {text} --lengths 512,1000000x"),
        ("another's directory", f"search {text} --target 2x --out run"),
        ("another comparison's", f"compare {text} --target 2x --out compared"),
        (
            "an export over something else",
            "export nan --long-factors unknown.json --out mine --force",
        ),
        ("nothing to draw", "report nan"),
        ("no such option", "search --trget 2x"),
    ]


FULL = (
    "import signal, resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); "
    "from longrope.cli import main; main()"
)


def run(arguments: list[str], folder: Path | None = None) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "longrope"]
    if arguments[0] == "FULL":  # a limit on file size fails as a full disk does
        launcher, arguments = [sys.executable, "-c", FULL], arguments[1:]
    return subprocess.run(
        [*launcher, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        table = cases(folder)
        shutil.copytree(BUNDLED, folder / "smaller")
        tensors = load_file(folder / "smaller/model.safetensors")
        tensors["model.norm.weight"] *= 1.5
        save_file(tensors, folder / "smaller/model.safetensors", metadata={"format": "pt"})
        rows = []
        print("| what is wrong | exit | the line |\n|---|---|---|")
        for what, command in table:
            done = run(command.split(), folder)
            lines = done.stderr.strip().splitlines()
            shown = lines[-1].replace(scratch, "") if lines else ""
            extra = f" (+{len(lines) - 1} lines)" if len(lines) > 1 else ""
            shown = shown.removeprefix("longrope: error: ")
            cell = shown.replace("|", "\\|")
            print(f"| {what} | {done.returncode} | {cell}{extra} |", flush=True)
            found = {"exit": done.returncode, "line": shown, "lines": len(lines)}
            rows.append({"what": what, "command": command} | found)
    print(record.write("bad-input", {}, rows))


if __name__ == "__main__":
    main()
