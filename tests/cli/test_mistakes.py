"""A user's mistake: exit code 2, and one line with the field, its value and the remedy."""

import json
import re

import pytest

from longrope.rope.rescale import Rescale
from program import MAIN, each_refused, refused, run, succeeds

LIBRARY = ["--data", "python-library"]


def test_usage(tmp_path):
    assert "--target" in refused("search", "--out", tmp_path)
    assert "'serch'" in refused("serch")
    assert "--jsn" in refused("inspect", "--jsn")
    for verb, *needed in (
        ("search", "--target", "2x", "--out", tmp_path),
        ("compare", "--target", "2x"),
        ("evaluate", "perplexity", "--lengths", 512),
        ("evaluate", "needle", "--lengths", 512),
    ):
        assert "'--data'" in refused(verb, *needed)


def test_target(tmp_path):
    search = ["search", *LIBRARY, "--out", tmp_path, "--target"]
    less = [*LIBRARY, "--lengths", "512", "--target", "64"]
    small, unreadable, *nothing = each_refused(
        [*search, "256"],
        [*search, "much"],
        ["compare", *less, "--methods", "none,yarn"],
        ["evaluate", "perplexity", *less, "--rescale", "yarn"],
    )
    for line in nothing:
        assert "--target is 64," in line
        assert " 256 " in line
    assert "--target is 256" in small
    assert " 8x" in small
    assert "'much'" in unreadable


def test_model(tmp_path):
    assert "./nowhere" in refused(
        "search", "./nowhere", "--target", "8x", *LIBRARY, "--out", tmp_path
    )


def test_data(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "short.txt").write_text("too short")
    messages = {
        "empty.txt": "is empty",
        "binary": "not UTF-8",
        "short.txt": "few tokens",
        "missing": "missing: no such",
    }
    search = ["search", "--target", "2x", "--out", tmp_path / "out"]
    lines = each_refused(*([*search, "--data", tmp_path / name] for name in messages))
    for line, message in zip(lines, messages.values(), strict=True):
        assert message in line
    assert not (tmp_path / "out").exists()


def test_settings(small_search, tmp_path):
    settings = (
        ("--windows", 0),
        ("--budget", 0),
        ("--population", 0),
        ("--mutation-probability", 2),
        ("--chunk-size", 0),
        ("--start-tokens", -1),
        ("--start-tokens", 257),
        ("--max-factor", 0.5),
        ("--max-factor", "inf"),
        ("--budget", 1345),
        ("--attention-factor", 0),
        ("--algorithm", "magic"),
        ("--dtype", "int4"),
        ("--device", "cuda:9"),
        ("--offload-activations", "moon"),
        ("--rope-scaling", "perhaps"),
    )
    lines = each_refused(*([*small_search, "--out", tmp_path, *setting] for setting in settings))
    for line, (option, value) in zip(lines, settings, strict=True):
        assert option.lstrip("-").replace("-", "_") in line.replace("-", "_"), line
        assert str(value) in line


def test_rescale_files(texts, tmp_path):
    data = ["--lengths", 512, "--data", texts]
    wrong, without = tmp_path / "wrong.json", tmp_path / "without.json"
    Rescale((1.0,) * 16, 1e4, 256, 512).save(wrong)
    without.write_text(wrong.read_text().replace('"factors"', '"factor"'))
    messages = {
        "nothing": "neither",
        tmp_path: "neither",
        wrong: "factors has 16 .* 32 ",
        without: "without.json: .*'factors'",
    }
    lines = each_refused(
        *(["evaluate", "perplexity", "--rescale", name, *data] for name in messages)
    )
    for line, message in zip(lines, messages.values(), strict=True):
        assert re.search(message, line), line


def test_directories(small_search, tmp_path):
    succeeds(*small_search, "--budget", 2, "--out", tmp_path / "a")
    line = refused(*small_search, "--budget", 2, "--out", tmp_path / "a", "--seed", 5)
    assert "differs in" in line
    assert "seed (there 0, now 5)" in line
    (tmp_path / "a" / "state.json").write_text("{")
    assert "state.json is damaged" in refused(*small_search, "--out", tmp_path / "a")
    fast = [*small_search[:-1], "gradient", "--out", tmp_path / "b"]
    messages = {
        ("report", tmp_path): f"{tmp_path}: nothing",
        (*fast, "--patience", 3): "--patience is 3",
        (*fast, "--step-size", 0): "--step-size is 0.0",
        (*fast, "--population", 16): "--population is 16: .*--algorithm evolution",
        (*fast, "--budget", 3): "--budget is 3",
        (*small_search, "--step-size", 0.1, "--out", tmp_path / "b"): "--step-size is 0.1",
        (*fast, "--dtype", "float16"): "dtype is float16",
    }
    for line, message in zip(each_refused(*messages), messages.values(), strict=True):
        assert re.search(message, line), line


def test_what_another_verb_left_is_not_written_over(texts, tmp_path):
    run_of, imported, compared = (tmp_path / name for name in ("run", "imported", "compared"))
    for directory, name in ((run_of, "recipe.yaml"), (imported, "rescale.json")):
        directory.mkdir()
        (directory / name).write_text("{}")
    search = ["search", "--target", "2x", *LIBRARY, "--out"]
    compare = ["compare", "--data", texts, "--tokens-per-document", 512, "--out", compared]
    both = ["--lengths", "256,512", "--target", "2x"]
    succeeds(*compare, *both, "--methods", "none, pi")
    messages = {
        (*search, run_of): "recipe.yaml .*state.json",
        (*search, imported): "rescale.json .*state.json",
        (*compare, "--target", "4x"): r"\(target 512, row none at 256, row none",
        (*compare, "--target", "2x", "--methods", "none,pi"): r"\(row none at 256, row pi at 256",
    }
    before = (compared / "compare.json").read_bytes()
    for line, message in zip(each_refused(*messages), messages.values(), strict=True):
        assert re.search(message, line), line
        assert "--out" in line
    another = [*compare, *both, "--methods", "none,pi", "--attention-factor", 1.2]
    assert "(attention_factor None)" in refused(*another)
    assert "process, not 2:" in refused(*another, env={"WORLD_SIZE": "2"})
    assert (compared / "compare.json").read_bytes() == before
    succeeds(*compare, *both, "--methods", "none,pi,ntk")  # all of it, and more
    evaluate = [
        "evaluate",
        "perplexity",
        "--data",
        texts,
        "--tokens-per-document",
        512,
        "--lengths",
        "512",
    ]
    evaluate += ["--target", "2x", "--out", tmp_path / "evaluated", "--rescale"]
    succeeds(*evaluate, "pi")
    assert "another measurement (rescale pi)" in refused(*evaluate, "ntk")


def test_full_disk(small_search, tmp_path):
    """A file-size limit stands in for a full disk: the writes fail the same way."""
    code = (
        "import signal, resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "from longrope.cli import main; main()"
    )
    done = run(*small_search, "--budget", 9, "--out", tmp_path / "a", code=code)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert str(tmp_path / "a") in line
    assert "written" in line
    assert "same command" in line
    summary = json.loads(succeeds(*small_search, "--budget", 9, "--out", tmp_path / "a", "--json"))
    assert summary["evaluations"] == 9
    comparison = ["compare", "--target", "2x", *small_search[4:6], "--out", tmp_path / "b"]
    done = run(*comparison, code=code)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert str(tmp_path / "b") in line
    assert "written" in line


def test_retrieval_and_generation(tmp_path):
    base = ["evaluate", "passkey", "bundled", "--lengths"]
    messages = {
        (*base, 512, "--trials", 0): "--trials is 0",
        (*base, 512, "--data", "x"): "--data",
        (*base, 40): "--lengths is 40",
        ("evaluate", "benchmarks", "--tasks", "mmlu", "--limit", 0): "--limit is 0",
        ("generate", "bundled", "--max-new-tokens", 0): "--max-new-tokens is 0",
        ("generate", "bundled"): "--prompt is empty",
        (*base, 512, "--lengths=1024"): "--lengths is given 2 times",
        ("generate", "runs/nowhere", "--prompt", "a"): "runs/nowhere: no such .*hub",
        ("generate", "bundled", "--prompt-file", tmp_path / "x"): "/x .*no such",
        ("extend", tmp_path, "--seed", 1): "--target is missing",
        ("plan", "bundled", "--gpus", "many"): "--gpus is 'many'",
        ("plan", "bundled", "--set", "finetune.steps"): "--set finetune.steps",
        ("plan", "bundled", "--set", "finetune.stesp=3"): "no key 'finetune.stesp'",
    }
    for line, message in zip(each_refused(*messages), messages.values(), strict=True):
        assert re.search(message, line.replace("No such", "no such")), line


@pytest.mark.slow
def test_memory(tmp_path):
    """What cannot fit is not begun, and no weight is read."""
    search = ["search", *LIBRARY, "--target", "1000000x", "--device", "cpu"]
    line = refused(*search, "--out", tmp_path / "out")
    assert "search at 256,000,000 tokens" in line
    assert "try --algorithm evolution, --offload-activations DIRECTORY, --offload-weights, " in line
    assert not (tmp_path / "out").exists()
    long = ["--device", "cpu", "--lengths", "2048,1000000x"]
    measuring = [
        ("compare", "--target", "2x", *LIBRARY, *long),
        ("evaluate", "passkey", *long),
        *(("evaluate", what, *LIBRARY, *long) for what in ("perplexity", "needle")),
        ("evaluate", "benchmarks", *long, "--tasks", "niah_single_1"),
    ]
    for line in each_refused(*measuring):
        assert "measuring at 256,000,000 tokens" in line
        assert "try --offload-activations DIRECTORY, --offload-weights, shorter --lengths" in line
    line = refused(
        "evaluate", "passkey", "--lengths", 512, "--offload-activations", tmp_path / "nowhere"
    )
    assert f"--offload-activations is '{tmp_path / 'nowhere'}'," in line


def test_a_directory_that_cannot_be_written_is_said_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    there = ["--target", "2x", "--out", tmp_path / "file"]
    for line in each_refused(
        *([verb, *LIBRARY, *there] for verb in ("compare", "search", "extend"))
    ):
        assert f"{tmp_path / 'file'} is not" in line
    out = ["--out", tmp_path / "out"]
    refused("compare", "--target", "2x", "--methods", "none", *out, "--data", tmp_path / "file")
    assert not list((tmp_path / "out").iterdir())


def test_empty_arguments_are_no_directories(tmp_path):
    """An unset variable: neither the current directory is read, nor is it written to."""
    (tmp_path / "private.txt").write_text("private " * 5000)
    search = ["search", "bundled", "--target", "2x"]
    mistakes = {
        "--data is empty": [*search, "--out", "out", "--data", ""],
        "--out is empty": [*search, "--data", "private.txt", "--out="],
        "an argument is empty": ["export", "", "--out", "out"],
        "--prompt-file is empty": ["generate", "bundled", "--prompt-file", ""],
        "--prompt is empty": ["generate", "bundled", "--prompt", ""],
    }
    for message, arguments in mistakes.items():
        assert f"error: {message}; give a" in refused(*arguments, cwd=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["private.txt"]


def test_a_full_or_closed_output_is_one_line():
    code = "import os, sys; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n" + MAIN
    done = run("inspect", "bundled", code=code)
    assert done.returncode == 2
    assert done.stderr.strip() == "longrope: error: the output: No space left on device"
    closed = "import os; r, w = os.pipe(); os.close(r); os.dup2(w, 1)\n" + MAIN
    done = run("inspect", "bundled", code=closed)
    assert (done.returncode, done.stderr) == (1, "")


def test_paths_and_lengths_out_of_range_are_refused():
    messages = {
        ("inspect", "x" * 300): "File name too long",
        ("inspect", "x/" * 3000): "File name too long",
        ("report", "x" * 300): "File name too long",
        ("inspect", "bundled", "--original-length", 0): "--original-length is 0",
        ("inspect", "bundled", "--original-length", -5): "--original-length is -5",
    }
    for line, message in zip(each_refused(*messages), messages.values(), strict=True):
        assert message in line
        assert len(line) < 400


def test_an_unexpected_error_is_one_line_with_its_traceback_in_a_file(tmp_path):
    code = (
        "import tempfile, longrope.models.info as info\n"
        "tempfile.tempdir = None\n"
        "def fails(*_, **__): raise KeyError('a strange key')\n"
        "info.inspect_model = fails\n"
    ) + MAIN
    done = run("inspect", "bundled", code=code, env={"TMPDIR": str(tmp_path)})
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "unexpected KeyError ('a strange key')" in line
    (log,) = tmp_path.glob("longrope-*.log")
    assert f"in {log}; please report it" in line
    content = log.read_text()
    assert "Traceback" in content
    assert "in fails" in content
    assert "'inspect', 'bundled'" in content
    shown = run("inspect", "bundled", code=code, env={"LONGROPE_TRACEBACK": "1"})
    assert "Traceback" in shown.stderr
