"""lm-eval on an extended model: its own Hugging Face model is the reference."""

import json
import subprocess
import sys
import warnings

import pytest

from longrope.evaluate.benchmarks import check_benchmarks, require_benchmark_data, score_benchmark
from longrope.evaluate.cache import MeasurementCache
from longrope.evaluate.compare import compare_benchmarks
from longrope.evaluate.lm_eval_tasks import manager, task_parts
from longrope.evaluate.local_data import read_dataset
from longrope.evaluate.settings import BenchmarkConfig
from longrope.evaluate.statistics import benchmark_difference
from longrope.execution import ExecutionConfig
from longrope.files.stores import JsonlStore
from longrope.layerwise.forward import LongForward
from longrope.models.load import load_model
from longrope.rope.apply import rescaled
from longrope.rope.pair import RescalePair
from program import refused, succeeds

pytestmark = [
    # lm-eval's and its data libraries' own
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def bundled():
    return load_model("bundled", ExecutionConfig(dtype="float32"))


def options(folder, **changes):
    fields = {"tasks": ("arc_challenge",), "num_fewshot": 2, "datasets": str(folder), "limit": 8}
    return BenchmarkConfig(**fields | changes)


def reference(loaded, rescale, task, data, shots, questions):
    """Scores and log-likelihoods as lm-eval's own model has them."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from longrope.evaluate.local_data import local_datasets

    with (
        warnings.catch_warnings(),
        rescaled(loaded.model, rescale),
        local_datasets(str(data)),
    ):
        warnings.simplefilter("ignore")
        model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, max_length=4096)
        found = simple_evaluate(
            model,
            tasks=[task],
            task_manager=manager(),
            num_fewshot=shots,
            limit=questions,
            bootstrap_iters=0,
        )
    return found["samples"][task]


@pytest.fixture
def likelihoods(monkeypatch):
    """What the model answers, as it does: log-likelihood and whether greedy."""
    from longrope.evaluate import lm_eval_model as harness

    seen = []
    plain = harness.HarnessModel._loglikelihood_tokens

    def noting(self, requests, **more):
        found = plain(self, requests, **more)
        seen.extend(found)
        return found

    monkeypatch.setattr(harness.HarnessModel, "_loglikelihood_tokens", noting)
    return seen


@pytest.mark.parametrize(
    ("task", "long"),
    [
        pytest.param("arc_challenge", None, marks=pytest.mark.slow),
        pytest.param("arc_challenge", 16, marks=pytest.mark.slow),
        ("hellaswag", None),
        pytest.param("hellaswag", 16, marks=pytest.mark.slow),
    ],
)
def test_scores_as_lm_evals_own_model(
    bundled, benchmark_data, task, long, likelihoods, monkeypatch
):
    """Under one rescale for every length, so that lm-eval's model can have it too."""
    from longrope.evaluate import lm_eval_model as harness

    rescale = bundled.info.rescale("yarn", 1024)
    prompts, prefill = [], LongForward.prefill
    monkeypatch.setattr(
        LongForward, "prefill", lambda self, ids: prompts.append(ids) or prefill(self, ids)
    )
    if long is not None:  # each question's text by itself, once for all its answers
        monkeypatch.setattr(harness, "_LONG", long)
    scores = score_benchmark(bundled, lambda tokens: rescale, 4096, task, options(benchmark_data))
    assert (len(prompts) == 8) == (long is not None)
    expected = reference(bundled, rescale, task, benchmark_data, 2, 8)
    assert list(scores) == [task]
    assert list(scores[task].values()) == [sample["acc_norm"] for sample in expected]
    theirs = [pair[0] for sample in expected for pair in sample["filtered_resps"]]
    assert [found[0] for found in likelihoods] == pytest.approx(theirs, rel=1e-4, abs=1e-4)


def test_each_prompt_by_its_own_length(bundled, benchmark_data, likelihoods):
    """Short factors up to the recovery length, long ones beyond it, in one batch of requests."""
    long = bundled.info.rescale("pi", 4096)
    short = bundled.info.rescale("none", 4096).replace(
        original_max_position_embeddings=64, max_position_embeddings=120
    )

    def asked(choose):
        likelihoods.clear()
        score_benchmark(bundled, choose, 4096, "arc_challenge", options(benchmark_data))
        return [found[0] for found in likelihoods]

    lengths = []

    def choose(tokens):
        lengths.append(tokens)
        return RescalePair(short, long).choose(tokens)

    mixed, all_short, all_long = asked(choose), asked(lambda _: short), asked(lambda _: long)
    assert min(lengths) <= 120 < max(lengths)
    # Each is what one of the two gives alone, and both are among them.
    by_short = [m == pytest.approx(s, abs=1e-4) for m, s in zip(mixed, all_short, strict=True)]
    by_long = [m == pytest.approx(x, abs=1e-4) for m, x in zip(mixed, all_long, strict=True)]
    assert all(s != x for s, x in zip(by_short, by_long, strict=True))
    assert any(by_short)
    assert any(by_long)


def test_a_part_that_is_kept_is_not_asked_again(bundled, benchmark_data, tmp_path, likelihoods):
    unscaled = bundled.info.rescale("none", 256)

    def ask():
        kept = JsonlStore(tmp_path / "parts.jsonl")
        asked = options(benchmark_data)
        return score_benchmark(bundled, lambda _: unscaled, 256, "arc_challenge", asked, kept)

    first, count = ask(), len(likelihoods)
    assert count > 0
    assert (ask(), len(likelihoods)) == (first, count)


def test_the_only_split_is_divided(benchmark_data):
    """What serves as an example is not asked."""
    found = read_dataset(benchmark_data, "allenai/ai2_arc", "ARC-Challenge")
    assert len(found["test"]) + len(found["train"]) == 14
    assert not set(found["test"]["question"]) & set(found["train"]["question"])
    with pytest.raises(FileNotFoundError, match="no directory owner/other"):
        read_dataset(benchmark_data, "owner/other", None)
    with pytest.raises(FileNotFoundError, match="no directory ARC-Easy"):
        read_dataset(benchmark_data, "allenai/ai2_arc", "ARC-Easy")


def test_no_question_is_its_own_example(tmp_path):
    """Hidden tests have no answers: examples are of the other split, and not asked there."""
    import datasets

    for split, count in (("test", 8), ("validation", 12)):
        rows = [{"question": f"{split} {i}"} for i in range(count)]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "owner" / f"{split}.parquet")
    found = read_dataset(tmp_path, "owner", None)
    assert [len(found[name]) for name in ("test", "validation", "train")] == [8, 9, 3]
    assert not set(found["validation"]["question"]) & set(found["train"]["question"])


def test_a_model_against_itself_differs_in_nothing(bundled, benchmark_data):
    unscaled = bundled.info.rescale("none", 256)
    asked = options(benchmark_data, tasks=("hellaswag",), num_fewshot=0)
    (row,) = compare_benchmarks(
        bundled, lambda tokens: unscaled, 256, None, asked, MeasurementCache()
    )
    assert (row["questions"], row["difference"], row["low"], row["high"]) == (8, 0, 0, 0)


def test_the_interval_is_that_of_paired_differences():
    original = {str(i): float(i % 2) for i in range(100)}
    extended = {key: 1.0 if key == "0" else value for key, value in original.items()}
    row = benchmark_difference("t", original, extended)
    assert row["difference"] == pytest.approx(0.01)
    assert row["high"] - row["difference"] == pytest.approx(1.959964 * 0.01)


@pytest.mark.slow
def test_ruler_makes_its_texts_at_the_lengths_asked(bundled, capsys):
    yarn = bundled.info.rescale("yarn", 4096)
    asked = BenchmarkConfig(tasks=("ruler_vt",), limit=1, num_fewshot=0, ruler_lengths=(2048, 3072))
    found = score_benchmark(bundled, lambda tokens: yarn, 4096, "ruler_vt", asked)
    assert list(found) == ["ruler_vt at 2,048", "ruler_vt at 3,072"]
    assert all(len(scores) == 1 for scores in found.values())
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ruler_cwe", "ruler_vt"])
def test_ruler_asks_every_model_the_same(bundled, task):
    texts = []
    for _ in range(2):
        with task_parts(task, bundled.tokenizer, [2048], None) as (part,):
            texts.append([doc["input"] for doc in part.eval_docs])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 400


def test_other_questions_are_not_paired():
    with pytest.raises(ValueError, match="different questions"):
        benchmark_difference("t", {"0 hash": 1.0}, {"0 other": 0.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("arc_chalenge",)}, "'arc_chalenge'.*arc_challenge"),
        ({"datasets": "nowhere"}, "datasets='nowhere'"),
        ({"tasks": ("niah_single_1",)}, "'niah_single_1' .* `lengths`"),
        ({"tasks": ("ruler_vt",), "ruler_lengths": (1024,)}, "`lengths` .* 2,048"),
        ({"tasks": ("longcxt",), "ruler_lengths": (2048,)}, "'longcxt' .* 'ruler'"),
    ],
)
def test_what_cannot_be_asked_is_refused(benchmark_data, changes, message):
    with pytest.raises(ValueError, match=message):
        check_benchmarks(options(benchmark_data, **changes))


def test_what_cannot_be_compared_is_refused_before_it_is_asked(bundled, benchmark_data, tmp_path):
    import datasets

    def refused(message, **changes):
        asked = options(benchmark_data, **changes)
        with pytest.raises(ValueError, match=message):
            require_benchmark_data(asked, bundled.tokenizer, 256)

    require_benchmark_data(options(benchmark_data), bundled.tokenizer, 256)
    refused("num_fewshot is 25.*'arc_challenge' has 3 ", num_fewshot=25)
    for owner, name, rows in (
        ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", [{"page": "x"}] * 4),
        ("openai/gsm8k", "main", [{"question": "1 + 1?", "answer": "#### 2"}] * 12),
    ):
        folder = tmp_path / owner / name
        folder.mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / "test.parquet")
    refused("'wikitext' reports word_perplexity", tasks=("wikitext",), datasets=str(tmp_path))
    message = "'gsm8k' .* 256 tokens.* 256 tokens"
    refused(message, tasks=("gsm8k",), datasets=str(tmp_path))


def test_a_task_read_in_several_ways_counts_by_the_first(bundled, tmp_path):
    import datasets

    folder = tmp_path / "openai" / "gsm8k" / "main"
    folder.mkdir(parents=True)
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(8)]
    datasets.Dataset.from_list(rows).to_parquet(folder / "test.parquet")
    asked = options(tmp_path, tasks=("gsm8k",), num_fewshot=0, limit=2)
    yarn = bundled.info.rescale("yarn", 1024)
    found = score_benchmark(bundled, lambda _: yarn, 1024, "gsm8k", asked)
    assert list(found["gsm8k"].values()) == [0, 0]


@pytest.mark.slow
def test_from_the_command_line(benchmark_data):
    """Against the same weights unscaled; what a method is made for must be said."""
    command = "evaluate benchmarks bundled --tasks arc_challenge --limit 4 --num-fewshot 1 --json"
    command += f" --datasets {benchmark_data} --rescale yarn"

    (row,) = json.loads(succeeds(*command.split(), "--target", "8x"))["benchmarks"]
    assert (row["task"], row["questions"]) == ("arc_challenge", 4)
    assert "--target is missing" in refused(*command.split())


@pytest.mark.slow
def test_without_a_hub_one_line_says_what_to_do(tmp_path):
    command = "evaluate benchmarks bundled --tasks arc_challenge --limit 2 --num-fewshot 0"
    done = subprocess.run(
        [sys.executable, "-m", "longrope", *command.split()],
        capture_output=True,
        text=True,
        timeout=200,
        env={"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "'arc_challenge'" in done.stderr
    assert "--datasets" in done.stderr
