"""The page of a run: whole in itself, readable on a phone, the same as Markdown."""

import json
import re
import shutil
import subprocess

import pytest

from longrope.report.headline import headline, holds_to
from longrope.report.page import write_page
from longrope.rope.methods import identity, yarn

LENGTHS = (256, 512, 1024, 2048)


def results():
    perplexity = [
        {"length": n, "method": m, "perplexity": p, "standard_error": 0.5, "tokens": 4096}
        for m, values in {
            "none": (10.0, 25.0, 60.0, None),
            "yarn": (12.0, 12.5, 13.0, 14.0),
            "longrope": (10.1, 9.8, 9.7, 9.6),
        }.items()
        for n, p in zip(LENGTHS, values, strict=True)
    ]
    without = {"length": 256, "method": "longrope without recovery", "perplexity": 11.0}
    perplexity.append(without | {"standard_error": None, "tokens": 4096})
    passkey = [
        {"length": n, "method": "longrope", "depth": d, "correct": 4 + (n == 256), "trials": 5}
        for n in LENGTHS
        for d in (0.25, 0.75)
    ]
    return {
        "schema": 1,
        "model": "a/<model> & more",
        "architecture": "LlamaForCausalLM",
        "parameters": 1000,
        "original_length": 256,
        "trained_length": None,
        "recovery_length": 512,
        "target": 2048,
        "attention_factor": 1.17,
        "perplexity": perplexity,
        "passkey": passkey,
        "needle": [],
        "recovery": [{"length": 256, "original": 10.0, "without": 11.0, "with": 10.1}],
        "benchmarks": [
            {"task": "hellaswag", "questions": 500, "original": 0.4, "without": 0.35}
            | {"with": 0.39, "difference": -0.01, "low": -0.03, "high": 0.01}
        ],
        "stages": [{"name": "search", "seconds": 61.0, "forwards": 5, "tokens": 10240}],
        "plan": [
            {"name": "search", "length": 2048, "tokens": 12288, "flops": 1.5e11, "memory": 3e9},
            {"name": "report", "length": 2048, "tokens": 0, "flops": 0.0, "memory": 0},
        ],
        "versions": {"longrope": "0.1.0"},
    }


@pytest.fixture
def run(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results()))
    yarn(1e4, 64, 256, 2048).save(tmp_path / "rescale.json")
    identity(1e4, 64, 256, 512).save(tmp_path / "short.json")
    (tmp_path / "recipe.yaml").write_text("target: 8x\n")
    write_page(tmp_path)
    return tmp_path


def test_nothing_is_fetched_and_nothing_unescaped(run):
    page = (run / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert "<script" not in page
    assert "a/&lt;model&gt; &amp; more" in page
    assert page.count("<svg ") == 3


def test_markdown_has_the_same_tables(run):
    text = (run / "report.md").read_text()
    assert text.startswith("# a/\\<model\\> \\& more: 256 → 2,048 tokens (8×)\n")
    assert "| longrope | 10.10 ± 0.50 | 9.80 ± 0.50 | 9.70 ± 0.50 | 9.60 ± 0.50 |" in text
    assert "| none | 10.00 ± 0.50 | 25.00 ± 0.50 | 60.00 ± 0.50 | ∞ ± 0.50 |" in text
    assert "| longrope | 10/10 (72%–100%) | 8/10 (49%–94%) |" in text
    assert "| 256 | 10.00 | 11.00 | 10.10 | +1.0% |" in text
    assert "| search | 2,048 | 12,288 | 1.5e+11 | 3.0 GB | 61 s | 5 | 10,240 |" in text
    for name in re.findall(r"\]\((images/[^)]+)\)", text):
        assert (run / name).read_bytes().startswith(b"\x89PNG")


def test_headline_leads_with_the_answer():
    lines = headline(results())
    assert "2,048 tokens holds up to 2,048 tokens" in lines[0]
    assert "9.60, -4.0% against 10.00 of the original model at 256; ∞ without" in lines[0]
    assert any("34 of 40" in line and "2,048" in line and "8 of 10" in line for line in lines)
    assert any("+1.0%" in line and "256" in line for line in lines)
    assert not any("jumps" in line for line in lines)


@pytest.mark.parametrize(
    ("length", "factor", "trained", "reached", "cause"),
    [
        (1024, 1.2, None, 512, "long factors apply beyond 512"),
        (2048, 1.2, None, 1024, "nothing was trained"),
        (2048, 1.2, 1024, 1024, "beyond the 1,024 tokens that were trained for"),
        (512, 1.2, 2048, 256, "did not suffice"),
        (256, 1.2, None, None, None),
    ],
)
def test_a_jump_is_named_with_its_cause(length, factor, trained, reached, cause):
    found = results() | {"trained_length": trained}
    for row in found["perplexity"]:
        if row["method"] == "longrope" and row["length"] == length:
            row["perplexity"] *= factor
    assert holds_to(found)[0] == reached
    assert bool(holds_to(found)[1])
    jumps = [line for line in headline(found) if "jumps" in line]
    assert [f"to {length:,} tokens" in line and cause in line for line in jumps] == (
        [True] if cause else []
    )


@pytest.mark.parametrize(("recovered", "harm"), [(10.1, False), (11.04, False), (11.2, True)])
def test_a_recovery_that_does_harm_is_named(recovered, harm):
    found = results()
    found["recovery"][0]["with"] = recovered
    (line,) = [line for line in headline(found) if line.startswith("Short context")]
    assert ("worse" in line) == harm


def test_learning_the_text_is_not_taken_for_longer_context():
    found = results()
    own = [row for row in found["perplexity"] if row["method"] == "longrope"]
    for row, value in zip(own, (8.0, 8.3, 8.5, 8.7), strict=True):  # the original has 10
        row["perplexity"] = value
    assert holds_to(found)[0] == 512
    assert "above the extended model's at 256" in headline(found)[0]


def test_few_passkeys_end_what_holds():
    found = results()
    for row in found["passkey"]:
        if row["length"] == 1024:
            row["correct"] = 3
    assert holds_to(found) == (512, "At 1,024 tokens 6 of 10 passkeys are found.")
    # Unless the original model does not find them either.
    row = {"length": 256, "method": "none", "depth": 0.5, "correct": 0, "trials": 10}
    found["passkey"].append(row)
    assert holds_to(found) == (2048, "")
    assert any("finds 0 of 10 at 256" in line for line in headline(found))


def test_factors_and_training_are_told_apart(run):
    found = results() | {"trained_length": 2048, "other_documents": ["a", "b", "c", "d"]}
    for row in found["perplexity"]:
        row["fine_tuned"] = row["method"].startswith("longrope")
    found["perplexity"] += [
        {"length": 2048, "method": f"fine-tuned + {m}", "perplexity": p, "standard_error": None}
        | {"tokens": 4096, "fine_tuned": True}
        for m, p in (("yarn", 9.9), ("ntk", 11.0))
    ]
    found["other_perplexity"] = [
        {"length": n, "method": m, "perplexity": p, "standard_error": None, "fine_tuned": True}
        for m, n, p in (("none", 256, 20.0), ("longrope", 256, 21.0), ("longrope", 512, 25.0))
    ]
    lines = headline(found)
    assert (
        "YaRN's factors 9.90, under NTK's 11.00, the original weights under YaRN's 14.00"
        in (lines[1])
    )
    assert any("another kind (a, b, c and 1 more)" in line and "+25.0%" in line for line in lines)
    assert any("jumps by +19.0% from 256 to 512 tokens on " in line for line in lines)
    (run / "results.json").write_text(json.dumps(found))
    write_page(run)
    text = (run / "report.md").read_text()
    assert "| fine-tuned + yarn | fine-tuned |" in text
    assert "| yarn | original |" in text


def test_a_directory_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no results.json; finish 'longrope extend'"):
        write_page(tmp_path)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser_nothing_is_wider_than_the_screen(run, width):
    """Headless Chromium writes the page's widths into its title, and the DOM out."""
    page = (run / "report.html").read_text()
    probe = (
        "<script>document.title = [document.documentElement.scrollWidth, innerWidth, "
        "document.querySelectorAll('figure svg').length, "
        "[...document.querySelectorAll('figure svg')].every("
        "i => i.clientWidth <= innerWidth)].join(' ')</script>"
    )
    (run / "probe.html").write_text(page.replace("</body>", probe + "</body>"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    # a headless window is at least 500 wide, so the phone is an inner frame
    frame = run / "frame.html"
    frame.write_text(
        f'<iframe src=probe.html width={width} height=900 onload="document.title='
        'this.contentDocument.title"></iframe>'
    )
    command += ["--allow-file-access-from-files", "--window-size=1400,1000", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stdout[:500]
    wide, screen, pictures, fit = title.group(1).split()
    assert (pictures, fit) == ("3", "true")
    assert int(wide) <= int(screen) <= width
