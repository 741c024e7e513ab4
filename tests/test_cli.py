"""The program as a user runs it: a process of its own, real files, real kills."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longrope.rope.rescale import Rescale

ROOT = Path(__file__).parents[1]
LONGROPE = [sys.executable, "-m", "longrope"]


def run(*arguments, launcher=LONGROPE, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*launcher, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options
    )


def succeeds(*arguments, **options) -> str:
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(*arguments, **options) -> str:
    """The one line that a user's mistake prints."""
    done = run(*arguments, **options)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("longrope: error: ")
    return line


def each_refused(*mistakes) -> list[str]:
    """The lines of many such mistakes, each in a fork of one program that has imported all."""
    code = (
        "import json, os, sys, longrope.extend\n"
        "from longrope.cli import main\n"
        "for arguments in json.load(sys.stdin):\n"
        "    if not os.fork():\n"
        "        sys.argv[1:] = arguments\n"
        "        main()\n"
        "    assert os.waitstatus_to_exitcode(os.wait()[1]) == 2, arguments\n"
    )
    asked = json.dumps([[str(a) for a in arguments] for arguments in mistakes])
    done = run("-c", code, launcher=[sys.executable], input=asked)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(mistakes)
    assert all(line.startswith("longrope: error: ") for line in lines)
    return lines


@pytest.fixture(scope="module")
def small(texts):
    """A search of seconds: options that every search below shares."""
    shared = ["search", "bundled", "--target", "2x", "--data", texts, "--samples", 2]
    return [*shared, "--algorithm", "paper"]


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['longrope', '--help']\n"
        "from longrope.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    out = succeeds("-c", code, launcher=[sys.executable])
    assert "search" in out
    assert out.strip().endswith("[]")


def test_inspect(checkpoints):
    facts = json.loads(succeeds("inspect", checkpoints("gpt_neox"), "--json"))
    assert (facts["rotary_dim"], facts["head_dim"], facts["extendable"]) == (4, 16, True)
    out = succeeds("inspect")
    assert re.search(r"rope_theta +10000", out)
    assert re.search(r"original_read_from +max_position_embeddings", out)


def test_inspect_tells_why_not(tmp_path):
    import transformers

    transformers.GPT2Config().save_pretrained(tmp_path)
    facts = json.loads(succeeds("inspect", tmp_path, "--json"))
    assert facts["extendable"] is False
    assert "no rotary" in facts["reason"]
    assert "GPT2LMHeadModel" in refused("search", tmp_path, "--target", "8x", "--out", tmp_path)


def test_search_evaluate_compare_report(small, texts, tmp_path):
    out = tmp_path / "search"
    summary = json.loads(succeeds(*small, "--out", out, "--budget", 6, "--json"))
    assert (summary["evaluations"], summary["computed"]) == (6, 6)
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert len(history) == 6
    keys = {"evaluation", "loss", "factors", "start_tokens", "attention_factor"}
    assert all(keys <= line.keys() for line in history)
    best = Rescale.load(out / "rescale.json")
    assert min(line["loss"] for line in history) == best.provenance["loss"] == summary["loss"]
    assert Rescale.load(out / "portable.json").start_tokens == 0

    again = json.loads(succeeds(*small, "--out", out, "--budget", 6, "--json"))
    assert (again["evaluations"], again["computed"]) == (6, 0)
    assert "already done" in succeeds(*small, "--out", out, "--budget", 6)

    data = ["--data", texts, "--lengths", "256,512"]
    rows = {}
    for method in ("none", "yarn", out / "rescale.json"):
        found = json.loads(succeeds("evaluate", "--rescale", method, *data, "--json"))
        rows[str(method)] = found["perplexity"]
        assert [row["length"] for row in found["perplexity"]] == [256, 512]
        assert {"method", "perplexity", "standard_error", "tokens", "windows"} <= found[
            "perplexity"
        ][0].keys()
    assert len({row[1]["perplexity"] for row in rows.values()}) == 3

    methods = f"none,pi,yarn,{out / 'rescale.json'}"
    comparison = ["compare", "--target", "2x", "--methods", methods, *data]
    found = json.loads(succeeds(*comparison, "--json"))
    names = {row["method"] for row in found["perplexity"]}
    assert {"none", "pi", "yarn", str(out / "rescale.json")} <= names
    assert any(name.startswith("yarn (attention factor 1.0") for name in names)
    assert {row["documents"] for row in found["perplexity"]} == {2}  # four, less the two searched
    assert all(row["method"] == str(out / "rescale.json") for row in found["differences"])
    assert (out / "compare.json").exists()
    table = succeeds(
        "compare", "--target", "2x", "--methods", "none,yarn", *data, "--out", tmp_path
    )
    assert "perplexity" in table

    for figure in ("factors.png", "history.png", "perplexity.png", "position.png"):
        (out / figure).unlink()
    succeeds("report", out)
    for figure in ("factors.png", "history.png", "perplexity.png", "position.png"):
        assert (out / figure).read_bytes().startswith(b"\x89PNG")


def test_the_authors_csv_is_a_rescale_too(texts, tmp_path):
    (tmp_path / "pi.csv").write_text(",".join(["2.0"] * 32))
    options = ["--lengths", 512, "--data", texts, "--json"]
    ours = json.loads(succeeds("evaluate", "--rescale", tmp_path / "pi.csv", *options))
    theirs = json.loads(
        succeeds("evaluate", "--rescale", "pi", *options, "--attention-factor", (1 + 1 / 8) ** 0.5)
    )
    assert ours["perplexity"][0]["perplexity"] == theirs["perplexity"][0]["perplexity"]


def test_documents_may_be_packed(texts, tmp_path):
    out = tmp_path / "packed"
    arguments = ["--target", "16x", "--data", texts, "--pack"]
    summary = json.loads(succeeds("search", *arguments, "--budget", 4, "--out", out, "--json"))
    assert summary["forwards"] <= 4
    methods = f"yarn,{out / 'rescale.json'}"
    rows = json.loads(succeeds("compare", *arguments, "--methods", methods, "--json"))["perplexity"]
    assert {(row["length"], row["documents"]) for row in rows} == {(4096, 1)}


def test_ctrl_c_is_no_success(small, tmp_path):
    process = subprocess.Popen(
        [*LONGROPE, *map(str, small), "--out", tmp_path],
        stderr=subprocess.PIPE,
        text=True,
        # what a shell starts in the background ignores it, and so would this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / "history.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1].startswith("longrope: error: stopped; it goes on")


def losses(out: Path) -> list:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


PAPER = ["--population", 4, "--mutations", 2, "--crossovers", 1]
FAST = ["--algorithm", "fast"]


@pytest.mark.parametrize(("algorithm", "after"), [(PAPER, 1), (PAPER, 5), (FAST, 2), (FAST, 6)])
def test_kill_9_costs_one_evaluation(small, tmp_path, algorithm, after):
    options = ["--budget", 9, *algorithm]
    succeeds(*small, *options, "--out", tmp_path / "whole")
    cut = tmp_path / "cut"
    process = subprocess.Popen(
        [*LONGROPE, *map(str, small), *map(str, options), "--out", cut], stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (cut / "history.jsonl").exists() and len(losses(cut)) >= after:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    known = len((cut / "history.jsonl").read_text().splitlines())
    summary = json.loads(succeeds(*small, *options, "--out", cut, "--json"))
    assert summary["computed"] == len(losses(tmp_path / "whole")) - known
    for name in ("history.jsonl", "rescale.json", "portable.json", "state.json"):
        assert (cut / name).read_text() == (tmp_path / "whole" / name).read_text(), name


@pytest.mark.parametrize(
    ("algorithm", "processes"), [(PAPER, 2), (PAPER, 3), ([*FAST, "--step-windows", 2], 2)]
)
def test_ranks_agree_candidate_for_candidate(small, tmp_path, algorithm, processes):
    options = ["--budget", 8, *algorithm]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    succeeds(*small, *options, "--out", tmp_path / "one", env=env)
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(processes), "-m", "longrope",
    ]  # fmt: skip
    succeeds(*small, *options, "--out", tmp_path / "many", launcher=torchrun, env=env)
    assert losses(tmp_path / "many") == losses(tmp_path / "one")
    for name in ("rescale.json", "portable.json", "state.json"):
        assert (tmp_path / "many" / name).read_text() == (tmp_path / "one" / name).read_text()


def test_a_rank_that_dies_ends_the_run_and_leaves_what_resumes(small, tmp_path):
    options = ["--budget", 40, "--out", tmp_path / "out"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    code = (
        "import os, signal, sys, longrope.search.objective as o\n"
        "original, calls = o.Objective.__call__, []\n"
        "def dying(self, *trial):\n"
        "    calls.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(calls) == 3:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(self, *trial)\n"
        "o.Objective.__call__ = dying\n"
        "from longrope.cli import main\nmain()\n"
    )
    script = tmp_path / "dying.py"
    script.write_text(code)
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", "2", str(script),
    ]  # fmt: skip
    done = run(*small, *options, launcher=torchrun, env=env)
    assert done.returncode != 0
    assert "longrope: error: another process of this run died; what was saved" in done.stderr
    known = losses(tmp_path / "out")
    assert len(known) == 4
    options[1] = 6
    summary = json.loads(succeeds(*small, *options, "--json", env=env))
    assert (summary["evaluations"], summary["computed"]) == (6, 2)
    assert losses(tmp_path / "out")[:4] == known


class TestMistakes:
    """Each is one line that names the field, its value and the remedy."""

    def test_usage(self, tmp_path):
        assert "--target" in refused("search", "--out", tmp_path)
        assert "No such command" in refused("serch")
        assert "No such option" in refused("inspect", "--jsn")

    def test_target(self, tmp_path):
        search = ["search", "--out", tmp_path, "--target"]
        small, unreadable = each_refused([*search, "256"], [*search, "much"])
        assert "--target is 256" in small
        assert "give a larger target" in small
        assert "'much'" in unreadable

    def test_model(self, tmp_path):
        assert "./nowhere" in refused("search", "./nowhere", "--target", "8x", "--out", tmp_path)

    def test_data(self, small, tmp_path):
        (tmp_path / "empty.txt").write_text("")
        (tmp_path / "binary").write_bytes(bytes(range(256)))
        (tmp_path / "short.txt").write_text("too short")
        messages = {
            "empty.txt": "is empty",
            "binary": "not UTF-8",
            "short.txt": "too few tokens",
            "missing": "no such file",
        }
        search = ["search", "--target", "2x", "--out", tmp_path / "out"]
        lines = each_refused(*([*search, "--data", tmp_path / name] for name in messages))
        for line, message in zip(lines, messages.values(), strict=True):
            assert message in line
        assert not (tmp_path / "out").exists()

    def test_settings(self, small, tmp_path):
        settings = (
            ("--samples", 0),
            ("--budget", 0),
            ("--population", 0),
            ("--probability", 2),
            ("--chunk", 0),
            ("--start-tokens", -1),
            ("--upper", 0.5),
            ("--attention-factor", 0),
            ("--algorithm", "magic"),
            ("--dtype", "int4"),
            ("--device", "cuda:9"),
            ("--hidden-device", "moon"),
            ("--existing-scaling", "perhaps"),
        )
        lines = each_refused(*([*small, "--out", tmp_path, *setting] for setting in settings))
        for line, (option, value) in zip(lines, settings, strict=True):
            assert option.lstrip("-").replace("-", "_") in line.replace("-", "_"), line
            assert str(value) in line

    def test_rescale_files(self, texts, tmp_path):
        data = ["--lengths", 512, "--data", texts]
        wrong, without = tmp_path / "wrong.json", tmp_path / "without.json"
        Rescale((1.0,) * 16, 1e4, 256, 512).save(wrong)
        without.write_text(wrong.read_text().replace('"factors"', '"factor"'))
        messages = {
            "nothing": "neither",
            wrong: "factors has 16 numbers; this model needs 32",
            without: "without.json: a rescale needs the key 'factors'",
        }
        lines = each_refused(*(["evaluate", "--rescale", name, *data] for name in messages))
        for line, message in zip(lines, messages.values(), strict=True):
            assert message in line

    def test_directories(self, small, tmp_path):
        succeeds(*small, "--budget", 2, "--out", tmp_path / "a")
        line = refused(*small, "--budget", 2, "--out", tmp_path / "a", "--seed", 5)
        assert "differs in" in line
        assert "seed (there 0, now 5)" in line
        (tmp_path / "a" / "state.json").write_text("{")
        assert "state.json is damaged" in refused(*small, "--out", tmp_path / "a")
        assert "nothing to draw" in refused("report", tmp_path)
        fast = [*small[:-1], "fast", "--out", tmp_path / "b"]
        assert "--patience is 3" in refused(*fast, "--patience", 3)
        assert "--rate is 0.0" in refused(*fast, "--rate", 0)
        line = refused(*fast, "--population", 16)
        assert "--population 16: settings of --algorithm paper" in line
        assert "--budget is 3" in refused(*fast, "--budget", 3)
        assert "--rate 0.1" in refused(*small, "--rate", 0.1, "--out", tmp_path / "b")
        assert "--dtype float16" in refused(*fast, "--dtype", "float16")

    def test_full_disk(self, small, tmp_path):
        """A file-size limit stands in for a full disk: the writes fail the same way."""
        code = (
            "import signal, resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
            "from longrope.cli import main; main()"
        )
        launcher = [sys.executable, "-c", code]
        done = run(*small, "--budget", 9, "--out", tmp_path / "a", launcher=launcher)
        assert done.returncode == 2
        assert "cannot be written" in done.stderr.splitlines()[-1]
        assert "run the same command again" in done.stderr.splitlines()[-1]
        summary = json.loads(succeeds(*small, "--budget", 9, "--out", tmp_path / "a", "--json"))
        assert summary["evaluations"] == 9


def test_retrieval_from_the_command_line(tmp_path):
    arguments = ["evaluate", "bundled", "--lengths", "200,512", "--trials", 6, "--passkey"]
    found = json.loads(succeeds(*arguments, "--json"))["passkey"]
    assert {row["length"] for row in found} == {200, 512}
    right = {
        length: sum(row["correct"] for row in found if row["length"] == length)
        for length in (200, 512)
    }
    assert right[200] >= 5
    assert right[512] <= 3  # beyond its window, unscaled
    out = succeeds(*arguments, "--rescale", "yarn", "--out", tmp_path)
    assert "95% interval" in out
    assert (tmp_path / "passkey.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(succeeds(*arguments[:-1], "--needle", "--json"))["needle"]
    assert sum(row["trials"] for row in found) == 12


def test_retrieval_refusals():
    base = ["evaluate", "bundled", "--lengths", "512"]
    assert "ask for one at a time" in refused(*base, "--passkey", "--needle")
    assert "--trials is 0" in refused(*base, "--passkey", "--trials", 0)
    assert "too few for the question" in refused(*base[:-1], "40", "--passkey")


def test_generate_refusals(tmp_path):
    assert "--max-new-tokens is 0" in refused("generate", "bundled", "--max-new-tokens", 0)
    assert "no such file" in refused("generate", "bundled", "--prompt-file", tmp_path / "x").lower()
    assert "--target is missing" in refused("extend", tmp_path)
