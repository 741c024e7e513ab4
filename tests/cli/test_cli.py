"""The commands as a user runs them: processes of their own, real files."""

import itertools
import json
import re
import shlex
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import longrope
from longrope.data.windows import load_documents
from longrope.models.bundled import BUNDLED
from longrope.models.load import load_tokenizer
from longrope.rope.rescale import Rescale
from program import interpreter, refused, run, succeeds

LIBRARY = ["--data", "python-library-held-out"]


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['longrope', '--help']\n"
        "from longrope.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    done = interpreter("-c", code)
    assert "search" in done.stdout
    assert done.stdout.strip().endswith("[]")


def test_recipes_import_neither_torch_nor_transformers():
    code = (
        "import sys, longrope.pipeline.recipe, longrope.search.settings, longrope.train.config\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert interpreter("-c", code).stdout.strip() == "[]"


def test_version_and_usage():
    assert succeeds("--version").strip() == longrope.__version__
    verbs = ["demo", "inspect", "plan", "search", "extend", "generate", "evaluate", "compare"]
    text = succeeds()
    places = [text.index(f"│ {verb} ") for verb in [*verbs, "report", "export", "verify", "import"]]
    assert places == sorted(places)
    for bare in (["plan"], ["search"], ["inspect"], ["evaluate"], ["evaluate", "passkey"]):
        assert "Usage:" in succeeds(*bare)


def test_a_published_scaled_model_is_measured_as_it_is(texts, tmp_path):
    shutil.copytree(BUNDLED, tmp_path / "published")
    config = json.loads((tmp_path / "published/config.json").read_text())
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
    config["rope_parameters"] = {"rope_theta": 1e4} | yarn
    (tmp_path / "published/config.json").write_text(json.dumps(config))
    how = ["--data", texts, "--lengths", "256,512", "--tokens-per-document", 512, "--json"]

    def measured(*arguments):
        found = json.loads(succeeds("evaluate", "perplexity", *arguments, *how))["perplexity"]
        return [row["perplexity"] for row in found]

    published = measured(tmp_path / "published")
    assert published == pytest.approx(measured("bundled", "--rescale", "yarn"), rel=1e-4)
    assert published[1] < 0.7 * measured("bundled")[1]


def test_a_key_of_the_recipe_can_be_set(tmp_path):
    settings = ["finetune.steps=7", "search.algorithm=evolution", "search.population=9"]
    asked = ["plan", "bundled", "--target", "64x", "--no-finetune", "--json"]
    refused(*asked)  # 64x needs fine-tuning
    asked.remove("--no-finetune")
    found = json.loads(succeeds(*asked, *(part for s in settings for part in ("--set", s))))
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert stages["finetune"]["steps"] == 7


def test_the_hint_after_an_export_can_be_pasted(tmp_path):
    out = tmp_path / "my [model]'s"
    said = succeeds("export", "bundled", "--long-factors", "yarn", "--target", "2x", "--out", out)
    hint = said.strip().splitlines()[-1].removeprefix("prove it: ")
    verify = ["longrope", "verify", str(out), "--engine", "transformers"]
    assert shlex.split(hint) == [*verify, "--source", "bundled"]


def test_inspect(checkpoints):
    info = json.loads(succeeds("inspect", checkpoints("gpt_neox"), "--json"))
    assert (info["rotary_dim"], info["head_dim"], info["extendable"]) == (4, 16, True)
    out = succeeds("inspect", "bundled")
    assert re.search(r"rope_theta +10000", out)
    assert re.search(r"original_read_from +max_position_embeddings", out)


def test_inspect_tells_why_not(tmp_path):
    import transformers

    transformers.GPT2Config().save_pretrained(tmp_path)
    info = json.loads(succeeds("inspect", tmp_path, "--json"))
    assert info["extendable"] is False
    assert "no rotary" in info["reason"]
    assert "GPT2LMHeadModel" in refused(
        "search", tmp_path, "--target", "8x", *LIBRARY, "--out", tmp_path
    )


@pytest.mark.slow
def test_search_evaluate_compare_report(small_search, texts, tmp_path):
    out = tmp_path / "search"
    summary = json.loads(succeeds(*small_search, "--out", out, "--budget", 6, "--json"))
    assert (summary["evaluations"], summary["computed"]) == (6, 6)
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert len(history) == 6
    keys = {"evaluation", "loss", "factors", "start_tokens", "attention_factor"}
    assert all(keys <= line.keys() for line in history)
    best = Rescale.load(out / "rescale.json")
    if not torch.cuda.is_available():  # in the header, so that histories from before go on
        assert json.loads((out / "state.json").read_text())["config"]["chunk_size"] == 2048
    assert min(line["loss"] for line in history) == best.provenance["loss"] == summary["loss"]
    assert Rescale.load(out / "portable.json").start_tokens == 0

    assert "already done: 6 forward passes" in succeeds(*small_search, "--out", out, "--budget", 6)
    assert len((out / "history.jsonl").read_text().splitlines()) == 6

    data = ["--data", texts, "--lengths", "256,512", "--tokens-per-document", 2048]
    rows = {}
    for method in ("yarn", out / "rescale.json"):
        found = json.loads(succeeds("evaluate", "perplexity", "--rescale", method, *data, "--json"))
        rows[str(method)] = found["perplexity"]
        assert [row["length"] for row in found["perplexity"]] == [256, 512]
        assert {"method", "perplexity", "standard_error", "tokens", "windows"} <= found[
            "perplexity"
        ][0].keys()
    assert len({row[1]["perplexity"] for row in rows.values()}) == 2

    methods = f"none,pi,yarn,{out / 'rescale.json'}"
    comparison = ["compare", "--target", "2x", "--methods", methods, *data]
    found = json.loads(succeeds(*comparison, "--json"))
    names = {row["method"] for row in found["perplexity"]}
    assert {"none", "pi", "yarn", str(out / "rescale.json")} <= names
    assert any(name.startswith("yarn (attention factor 1.0") for name in names)
    assert {row["documents"] for row in found["perplexity"]} == {2}  # four, less the two searched
    pairs = [(row["method"], row["against"]) for row in found["differences"]]
    assert len(set(pairs)) == len(names) * (len(names) - 1) // 2
    assert [method for method, _ in pairs[: len(names) - 1]] == [str(out / "rescale.json")] * (
        len(names) - 1
    )
    assert (out / "compare.json").exists()
    table = succeeds(
        "compare", "--target", "2x", "--methods", "none,yarn", *data, "--out", tmp_path
    )
    assert "perplexity" in table
    (best,) = re.findall(r"Best at 512 tokens of this text: (\w+);", table)
    first = next(line for line in table.splitlines() if line.startswith("│ 512 "))
    assert f" {best} " in first

    for figure in ("factors.png", "history.png", "perplexity.png", "position.png"):
        (out / figure).unlink()
    succeeds("report", out)
    for figure in ("factors.png", "history.png", "perplexity.png", "position.png"):
        assert (out / figure).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_one_large_file_serves_a_search_and_a_comparison(texts, tmp_path):
    """The search takes windows of its first half, compare all of its second."""
    book, out = tmp_path / "book.txt", tmp_path / "search"
    book.write_text("\n\n".join(file.read_text() for file in sorted(texts.glob("*.txt"))))
    search = ["search", "bundled", "--target", "2x", "--data", book, "--out", out]
    succeeds(*search, "--windows", 2, "--budget", 4)
    compare = ["compare", "--target", "2x", "--data", book, "--out", tmp_path / "compared"]
    methods = f"yarn,{out / 'rescale.json'}"
    found = json.loads(succeeds(*compare, "--methods", methods, "--json"))
    tokenizer = load_tokenizer("bundled")
    (document,) = load_documents(tokenizer, [str(book)])
    second_half = (len(document) - 512) // 2
    assert {row["documents"] for row in found["perplexity"]} == {1}
    windows = second_half // 512
    assert {row["tokens"] for row in found["perplexity"]} == {windows * 511}  # BOS is one of 512
    assert all(row["standard_error"] for row in found["differences"])
    # A search used all of the other file, so nothing is left of it.
    short = tmp_path / "short.txt"
    short.write_text(book.read_text()[:3000])
    other = tmp_path / "other"
    search = ["search", "bundled", "--target", "2x", "--data", short, "--budget", 4]
    succeeds(*search, "--out", other)
    compare = ["compare", "--target", "2x", "--data", short, "--out", other]
    line = refused(*compare, "--methods", f"yarn,{other / 'rescale.json'}")
    assert "all documents were used" in line


def test_the_authors_csv_is_a_rescale_too(texts, tmp_path):
    """Also in a list, where its path may contain a comma."""
    file = tmp_path / "s=8,b=4 (x)" / "pi.csv"
    file.parent.mkdir()
    file.write_text(",".join(["2.0"] * 32))
    options, perplexity = (
        ["--lengths", 512, "--data", texts, "--json"],
        ["evaluate", "perplexity", "--rescale"],
    )
    ours = json.loads(succeeds(*perplexity, file, *options))
    many = ",yarn" * 60  # together longer than the name of a file may be
    methods = ["--target", "2x", "--methods", f"none, {file},pi{many}"]
    found = json.loads(succeeds("compare", *methods, *options))["perplexity"]
    assert {"none", str(file)} < {row["method"] for row in found}
    (row,) = (row for row in found if row["method"] == str(file))
    assert row["perplexity"] == ours["perplexity"][0]["perplexity"]
    theirs = json.loads(
        succeeds(*perplexity, "pi", *options, "--attention-factor", (1 + 1 / 8) ** 0.5)
    )
    assert ours["perplexity"][0]["perplexity"] == theirs["perplexity"][0]["perplexity"]


@pytest.mark.slow
def test_dynamic_scaling_is_measured_as_its_refusal_says(tmp_path):
    config = AutoConfig.from_pretrained(BUNDLED)
    config.rope_parameters |= {"rope_type": "dynamic", "factor": 4.0}
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, config=config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    tokenizer = load_tokenizer("bundled")
    tokenizer.save_pretrained(tmp_path)
    asked = ["evaluate", "perplexity", tmp_path, *LIBRARY, "--lengths", "512,1024"]
    asked += ["--tokens-per-document", 1024]
    line = refused(*asked)
    remedy = re.findall(r"(--[a-z-]+) ([a-z0-9-]+)", line)
    found = json.loads(succeeds(*asked, *itertools.chain(*remedy), "--json"))
    expected = longrope.perplexity(
        model, tokenizer, LIBRARY[1], lengths=[512, 1024], tokens_per_document=1024
    )
    for row, other in zip(found["perplexity"], expected, strict=True):
        assert row["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)


@pytest.mark.slow
def test_documents_may_be_packed(texts, tmp_path):
    out = tmp_path / "packed"
    arguments = ["--target", "16x", "--data", texts, "--pack"]
    short = ["--budget", 4, "--windows", 1, "--transfer", "none", "--json"]
    summary = json.loads(succeeds("search", *arguments, *short, "--out", out))
    assert summary["forwards"] <= 4
    methods = ["--methods", f"yarn,{out / 'rescale.json'}", "--tokens-per-document", 4096]
    rows = json.loads(succeeds("compare", *arguments, *methods, "--json"))["perplexity"]
    assert {(row["length"], row["documents"]) for row in rows} == {(4096, 1)}


def test_retrieval_from_the_command_line(tmp_path):
    arguments = ["bundled", "--lengths", "200,512", "--trials", 6]
    found = json.loads(succeeds("evaluate", "passkey", *arguments, "--json"))["passkey"]
    assert {row["length"] for row in found} == {200, 512}
    right = {
        length: sum(row["correct"] for row in found if row["length"] == length)
        for length in (200, 512)
    }
    assert right[200] >= 5
    assert right[512] <= 3  # beyond its window, unscaled
    out = succeeds("evaluate", "passkey", *arguments, "--rescale", "yarn", "--out", tmp_path)
    assert "95% interval" in out
    assert (tmp_path / "passkey.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(succeeds("evaluate", "needle", *arguments, *LIBRARY, "--json"))["needle"]
    assert sum(row["trials"] for row in found) == 12


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1", "utf-8"])
def test_output_never_fails_on_a_character(tmp_path, encoding):
    """A name that the terminal cannot show, at the end of the work."""
    code = """
import io, sys
sys.stdout = io.TextIOWrapper(sys.stdout.buffer, *sys.argv.pop().split(":"))
from longrope.cli import main
main()
"""
    out = tmp_path / "λ 😀 \udcff"  # the last is a byte that is no UTF-8
    measure = ["evaluate", "passkey", "--lengths", 256, "--trials", 1, "--out", out]
    done = run(*measure, encoding, code=code)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((out / "passkey.json").read_text())["passkey"]
    assert (row["length"], row["trials"]) == (256, 1)
    assert "256" in done.stdout
    assert "passkey.png" in done.stdout
