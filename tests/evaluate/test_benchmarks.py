"""lm-eval on an extended model: its own Hugging Face model is the reference."""

import contextlib
import subprocess
import sys
import warnings

import pytest

from longrope.evaluate.benchmarks import (
    BenchmarkOptions,
    _manager,
    ask_benchmark,
    compare_with_original,
    paired,
)
from longrope.evaluate.local_data import read_dataset
from longrope.model import load_model
from longrope.rope.install import installed
from longrope.rope.switch import Pair

pytestmark = [
    # lm-eval's and its data libraries' own
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def bundled():
    return load_model("bundled", dtype="float32")


def options(folder, **changes):
    fields = {"tasks": ("arc_challenge",), "shots": 2, "data": str(folder), "questions": 8}
    return BenchmarkOptions(**fields | changes)


def reference(loaded, rescale, task, data, shots, questions):
    """Scores and log-likelihoods as lm-eval's own model has them."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from longrope.evaluate.local_data import local_datasets

    with (
        warnings.catch_warnings(),
        installed(loaded.model, rescale),
        local_datasets(str(data)),
    ):
        warnings.simplefilter("ignore")
        model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, max_length=4096)
        found = simple_evaluate(
            model,
            tasks=[task],
            task_manager=_manager(),
            num_fewshot=shots,
            limit=questions,
            bootstrap_iters=0,
        )
    return found["samples"][task]


@pytest.mark.parametrize("task", ["arc_challenge", "hellaswag"])
def test_scores_as_lm_evals_own_model(bundled, benchmark_data, task, monkeypatch):
    """Under one rescale for every length, so that lm-eval's model can have it too."""
    from longrope.evaluate import harness

    rescale = bundled.facts.rescale("yarn", 1024)
    seen = []
    plain = harness.HarnessModel._loglikelihood_tokens

    def kept(self, requests, **more):
        seen.extend(plain(self, requests, **more))
        return seen

    monkeypatch.setattr(harness.HarnessModel, "_loglikelihood_tokens", kept)
    scores = ask_benchmark(bundled, lambda tokens: rescale, 4096, task, options(benchmark_data))
    expected = reference(bundled, rescale, task, benchmark_data, 2, 8)
    assert list(scores) == [task]
    assert list(scores[task].values()) == [sample["acc_norm"] for sample in expected]
    theirs = [pair[0] for sample in expected for pair in sample["filtered_resps"]]
    assert [found[0] for found in seen] == pytest.approx(theirs, rel=1e-4, abs=1e-4)


def test_each_prompt_by_its_own_length(bundled, benchmark_data):
    """Short factors up to the recovery length, long ones beyond it, in one batch of requests."""
    long = bundled.facts.rescale("pi", 4096)
    short = bundled.facts.rescale("none", 4096).replace(
        original_max_position_embeddings=64, max_position_embeddings=120
    )
    asked: set[int] = set()

    def choose(tokens):
        asked.add(tokens)
        return Pair(short, long).choose(tokens)

    mixed = ask_benchmark(bundled, choose, 4096, "arc_challenge", options(benchmark_data))
    assert min(asked) <= 120 < max(asked)
    assert mixed["arc_challenge"].keys() == {f"arc_challenge {i}" for i in range(8)}


def test_the_only_split_is_divided(benchmark_data):
    """What serves as an example is not asked."""
    found = read_dataset(benchmark_data, "allenai/ai2_arc", "ARC-Challenge")
    assert len(found["test"]) + len(found["train"]) == 14
    assert not set(found["test"]["question"]) & set(found["train"]["question"])
    with pytest.raises(FileNotFoundError, match="no folder owner/other"):
        read_dataset(benchmark_data, "owner/other", None)


def test_a_model_against_itself_differs_in_nothing(bundled, benchmark_data):
    unscaled = bundled.facts.rescale("none", 256)
    asked = options(benchmark_data, tasks=("hellaswag",), shots=0)
    (row,) = compare_with_original(bundled, lambda tokens: unscaled, 256, None, asked)
    assert (row["questions"], row["difference"], row["low"], row["high"]) == (8, 0, 0, 0)


def test_the_interval_is_that_of_paired_differences():
    original = {str(i): float(i % 2) for i in range(100)}
    extended = {key: 1.0 if key == "0" else value for key, value in original.items()}
    row = paired("t", original, extended)
    assert row["difference"] == pytest.approx(0.01)
    assert row["high"] - row["difference"] == pytest.approx(1.959964 * 0.01)


def test_ruler_makes_its_texts_at_the_lengths_asked(bundled):
    yarn = bundled.facts.rescale("yarn", 4096)
    asked = BenchmarkOptions(("ruler_vt",), questions=1, shots=0, lengths=(2048, 3072))
    with contextlib.redirect_stdout(None):
        found = ask_benchmark(bundled, lambda tokens: yarn, 4096, "ruler_vt", asked)
    assert list(found) == ["ruler_vt at 2,048", "ruler_vt at 3,072"]
    assert all(len(scores) == 1 for scores in found.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("arc_chalenge",)}, "no task 'arc_chalenge'.*arc_challenge"),
        ({"questions": 0}, "--questions is 0"),
        ({"shots": -1}, "--shots is -1"),
        ({"data": "nowhere"}, "--benchmark-data nowhere: no such folder"),
        ({"tasks": ("niah_single_1",)}, "--benchmarks niah_single_1 .*--lengths"),
        ({"tasks": ("ruler_vt",), "lengths": (1024,)}, "--lengths of 2,048 tokens or more"),
    ],
)
def test_what_cannot_be_asked_is_refused(benchmark_data, changes, message):
    with pytest.raises(ValueError, match=message):
        options(benchmark_data, **changes).check()


def test_without_a_hub_one_line_says_what_to_do(tmp_path):
    command = "evaluate bundled --benchmarks arc_challenge --questions 2 --shots 0"
    done = subprocess.run(
        [sys.executable, "-m", "longrope", *command.split()],
        capture_output=True,
        text=True,
        timeout=200,
        env={"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "--benchmarks arc_challenge: its data cannot be read" in done.stderr
    assert "--benchmark-data DIR" in done.stderr
