"""Passkey and needle: lengths in tokens, depths, and what counts as right."""

import dataclasses
import random

import pytest
import torch

from data.test_encoding import WRITTEN
from longrope.data.encoding import encode
from longrope.data.prompts import (
    TASK,
    depths,
    haystack_lines,
    needle_prompt,
    passkey_prompt,
    question_tokens,
)
from longrope.data.windows import TokenDocument
from longrope.evaluate.retrieval import RetrievalRow, retrieve
from longrope.evaluate.statistics import retrieval_totals, wilson
from longrope.files.stores import JsonlStore
from longrope.layerwise.forward import LongForward
from longrope.models.load import load_model


@pytest.fixture(scope="module")
def bundled():
    return load_model("bundled")


@pytest.mark.parametrize("length", [110, 256, 777, 4096])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_passkey_prompt_fills_its_length(bundled, length, depth):
    prompt = passkey_prompt(bundled.tokenizer, length, depth, random.Random(1))
    assert len(prompt.ids) == length
    text = bundled.tokenizer.decode(prompt.ids, skip_special_tokens=True)
    assert text.startswith(TASK)
    answer = bundled.tokenizer.decode(prompt.ids[-prompt.answer_tokens :]).strip()
    assert len(answer) == 5
    assert f"The pass key is {answer}. Remember it. {answer} is the pass key.\n" in text
    assert text.endswith(f"What is the pass key? The pass key is {answer}")
    if length > 256:
        before = text.index("The pass key is") - len(TASK)
        after = len(text) - text.index("What is the pass key?")
        where = before / (len(text) - len(TASK) - after)
        assert where == pytest.approx(depth, abs=0.15)


def test_a_needle_stands_between_lines_of_the_haystack(bundled):
    lines = [f"line {i} of a long story\n" for i in range(2000)]
    prompt = needle_prompt(bundled.tokenizer, lines, 1000, 0.3, random.Random(0))
    text = bundled.tokenizer.decode(prompt.ids, skip_special_tokens=True)
    assert len(prompt.ids) == 1000
    assert "\nThe magic number of " in text
    with pytest.raises(ValueError, match=r"length is 1,000, .* \d+ tokens .*`data`"):
        needle_prompt(bundled.tokenizer, lines[:20], 1000, 0.3, random.Random(0))


@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize("length", [130, 1000, 4096])
def test_a_needle_prompt_has_its_length_in_any_text(bundled, texts, write, length):
    tokenizer = bundled.tokenizer
    text = write((texts / "argparse.txt").read_text() + (texts / "http.txt").read_text())
    (ids,) = encode(tokenizer, [text])
    lines = haystack_lines([TokenDocument("d", ("d",), ids)], tokenizer, length)
    assert len(encode(tokenizer, ["".join(lines)])[0]) < 3 * length
    for depth in (0.0, 0.5, 1.0):
        prompt = needle_prompt(tokenizer, lines, length, depth, random.Random(0))
        assert len(prompt.ids) == length
        found = tokenizer.decode(prompt.ids, skip_special_tokens=True)
        at = found.index("The magic number of ") / len(found)
        if length > 130:
            assert at == pytest.approx(0.8 * depth + 0.1, abs=0.2)


def test_every_length_from_the_shortest_is_reached(bundled):
    shortest = question_tokens(bundled.tokenizer)
    for length in range(shortest, shortest + 80):
        prompt = passkey_prompt(bundled.tokenizer, length, 0.5, random.Random(length))
        assert len(prompt.ids) == length


def test_a_length_that_no_text_reaches_is_refused():
    """Here every word takes 50 tokens, so most lengths are missed by more than 1%."""

    def tokenizer(texts, **_):
        def one(text):
            return [1] * 50 * len(text.split())

        return {"input_ids": one(texts) if isinstance(texts, str) else [*map(one, texts)]}

    assert len(passkey_prompt(tokenizer, 5000, 0.5, random.Random(0)).ids) == 5000
    assert len(passkey_prompt(tokenizer, 5049, 0.5, random.Random(0)).ids) == 5000
    with pytest.raises(ValueError, match=r"length is 4,049, .* nearest prompt has 4,000 tokens"):
        passkey_prompt(tokenizer, 4049, 0.5, random.Random(0))


def test_too_short_for_the_question(bundled):
    with pytest.raises(ValueError, match="length is 40"):
        passkey_prompt(bundled.tokenizer, 40, 0.5, random.Random(0))


def test_depths_are_stratified():
    found = depths(20, random.Random(3))
    assert [int(20 * depth) for depth in found] == list(range(20))


@torch.inference_mode()
def test_right_is_what_greedy_generation_says(bundled):
    """The one forward over prompt and answer against transformers' own generate()."""

    def make(length, depth, rng):
        return passkey_prompt(bundled.tokenizer, length, depth, rng)

    forward = LongForward(bundled.model)
    for length, outcomes in ((250, {1}), (420, {0, 1})):
        rows = retrieve(forward, make, length, None, trials=12, bins=12, seed=1)
        rng = random.Random(f"1 {length}")
        for row, depth in zip(rows, depths(12, rng), strict=True):
            prompt = make(length, depth, rng)
            ids = torch.from_numpy(prompt.ids[: -prompt.answer_tokens])[None]
            answer = bundled.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=prompt.answer_tokens,
                do_sample=False,
            )[0, ids.shape[1] :]
            assert row.correct == int(
                answer.tolist() == prompt.ids[-prompt.answer_tokens :].tolist()
            )
            assert row.trials == 1
        assert {row.correct for row in rows} <= outcomes


def test_a_killed_one_asks_only_what_is_left(bundled, tmp_path, monkeypatch):
    def make(length, depth, rng):
        return passkey_prompt(bundled.tokenizer, length, depth, rng)

    forward, file = LongForward(bundled.model), tmp_path / "parts.jsonl"
    answers, batches = forward.score, []

    def counted(ids, asked):
        if len(batches) == most:
            raise KeyboardInterrupt
        batches.append(len(ids))
        return answers(ids, asked)

    monkeypatch.setattr(forward, "score", counted)
    monkeypatch.setattr("longrope.evaluate.retrieval.BATCH_TOKENS", 900)
    most = 3
    with pytest.raises(KeyboardInterrupt):
        retrieve(forward, make, 420, None, trials=9, seed=1, answered=JsonlStore(file))
    first, most = sum(batches), 99
    found = retrieve(forward, make, 420, None, trials=9, seed=1, answered=JsonlStore(file))
    assert first > 0
    assert sum(batches) == 9  # none twice
    assert found == retrieve(forward, make, 420, None, trials=9, seed=1)


def test_interval_of_a_share():
    low, high = wilson(45, 50)  # R: binom::binom.wilson(45, 50)
    assert (low, high) == (pytest.approx(0.7864, abs=1e-4), pytest.approx(0.9565, abs=1e-4))
    assert wilson(20, 20)[0] == pytest.approx(0.8389, abs=1e-4)
    assert wilson(0, 20)[0] == 0


def test_totals():
    rows = [
        RetrievalRow(256, 0.1, 1, 2),
        RetrievalRow(256, 0.9, 2, 2),
        RetrievalRow(512, 0.5, 0, 3),
    ]
    assert retrieval_totals(map(dataclasses.asdict, rows)) == {256: (3, 4), 512: (0, 3)}


def test_lines_of_documents(bundled):
    ids = torch.tensor(bundled.tokenizer("a\nb\n", add_special_tokens=False)["input_ids"]).numpy()
    lines = haystack_lines([TokenDocument("d", ("d",), ids)], bundled.tokenizer, 9999)
    assert lines[:2] == ["a\n", "b\n"]
