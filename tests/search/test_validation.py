"""A search's result is accepted on unseen windows, or something harmless is."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope.data import kinds
from longrope.distributed import Ranks
from longrope.models.load import load_model
from longrope.rope.rescale import Rescale
from longrope.search.objective import window_losses
from longrope.search.run import SearchOptions, run_search
from longrope.search.settings import GradientSearchConfig
from longrope.search.validation import OWN, validate

KINDS = (OWN, OWN, "prose", "prose", "code", "code")
SHARED = {
    "rope_theta": 1e4,
    "original_max_position_embeddings": 256,
    "max_position_embeddings": 1024,
}
RESULT, START, YARN, PRO, NTK = (
    Rescale(tuple(np.geomspace(1, last, 8)), **SHARED) for last in (4.4, 3.8, 4.0, 3.6, 3.2)
)


def between(published, share):
    """Factors at a share of the way from a published method's to the result's, in ln λ."""
    parts = np.array(published.factors) ** (1 - share), np.array(RESULT.factors) ** share
    return Rescale(tuple(parts[0] * parts[1]), **SHARED)


PUBLISHED = {"yarn": YARN, "mrrope-pro": PRO, "ntk": NTK}


def run(result=0.0, two=0.0, one=0.0, start=0.0, yarn=0.0, pro=0.0, ntk=0.0):
    """Validate with losses by candidate: one number for all windows, or one for each."""
    given = {RESULT: result, START: start, YARN: yarn, PRO: pro, NTK: ntk}
    given |= {between(method, 2 / 3): two for method in (YARN, PRO)}
    given |= {between(method, 1 / 3): one for method in (YARN, PRO)}
    asked = []

    def measure(rescale):
        asked.append(rescale)
        (losses,) = (
            losses
            for known, losses in given.items()
            if np.allclose(known.factors, rescale.factors, rtol=1e-9)
        )
        return list(np.broadcast_to(np.asarray(losses, dtype=float) + 3, len(KINDS)))

    chosen, found = validate(measure, KINDS, RESULT, ("ramp 4-1", START), PUBLISHED)
    return chosen, found, asked


def test_a_better_result_is_accepted_and_its_gain_is_paired():
    differences = np.array([-0.3, -0.1, -0.2, -0.4, -0.1, -0.1])
    noise = np.array([0.5, -0.7, 0.2, 0.1, 0.9, -0.3])
    chosen, found, asked = run(result=differences + noise, start=noise, yarn=noise + 0.05, pro=1)
    assert chosen == RESULT
    assert (found.start, found.chosen) == ("ramp 4-1", "result")
    # Half for the two windows of the text, half for the four others.
    assert found.gain == pytest.approx(0.5 * 0.2 + 0.5 * 0.2)
    own, others = np.var([0.3, 0.1], ddof=1), np.var([0.2, 0.4, 0.1, 0.1], ddof=1)
    expected = math.sqrt(own / 2 / 4 + others / 4 / 4)
    assert found.gain_standard_error == pytest.approx(expected)
    assert found.gains == pytest.approx({OWN: 0.2, "prose": 0.3, "code": 0.1})
    # Two published methods are measured: the best on the search windows.
    assert asked == [START, RESULT, YARN, PRO]


@pytest.mark.parametrize(("gain", "chosen"), [(0.006, "ramp 4-1"), (0.02, "result")])
def test_a_gain_within_its_standard_error_is_none(gain, chosen):
    noise = np.array([0.01, -0.01, 0.02, -0.02, 0.01, -0.01])  # of the mean: 0.007
    worse = {"two": 1.0, "one": 1.0, "yarn": 0.01, "pro": 0.01}
    _, found, _ = run(result=noise - gain, **worse)
    assert found.chosen == chosen


def test_harm_to_one_kind_leads_back_to_the_published_method():
    harm, gain = [-0.5, -0.5, 0.05, 0.05, -0.1, -0.1], [-0.2, -0.2, 0, 0, -0.1, -0.1]
    more = {"yarn": 0.001, "pro": 0.002}
    assert run(result=harm, two=gain, **more)[1].chosen == "67% of the way"
    chosen, found, _ = run(result=harm, two=harm, one=gain, **more)
    np.testing.assert_allclose(chosen.factors, between(YARN, 1 / 3).factors)
    assert (found.chosen, found.start) == ("33% of the way", "ramp 4-1")
    chosen, found, _ = run(result=harm, two=harm, one=harm, start=gain, **more)
    assert (chosen, found.chosen, found.gain) == (START, "ramp 4-1", 0.0)


def test_a_harmful_start_is_no_measure_and_no_result():
    """A start that is best on the text itself, and harms code: today's most frequent fault."""
    harm = [-0.5, -0.5, -0.1, -0.1, 0.07, 0.07]
    chosen, found, _ = run(result=harm, two=harm, one=harm, start=harm, pro=0.01)
    assert (chosen, found.chosen, found.start) == (YARN, "yarn", "yarn")
    chosen, found, _ = run(result=[-0.1] * 6, start=harm)
    assert (chosen, found.start) == (RESULT, "yarn")


def test_a_published_method_with_its_own_attention_factor_can_be_the_result():
    worse, yarn = START.replace(attention_factor=1.2), START.replace(attention_factor=1.1)
    losses = {1.2: 3.1, 1.1: 3.0, 1.0: 3.2}

    def measure(rescale):
        return [losses.get(rescale.attention_factor, 3.3)] * len(KINDS)

    chosen, found = validate(measure, KINDS, RESULT, ("yarn", worse), {"yarn": yarn})
    assert (chosen, found.chosen) == (yarn, "published yarn")


def test_losses_that_are_not_finite_are_never_chosen():
    chosen, found, _ = run(result=math.nan, two=math.nan, one=math.nan, start=0.1)
    assert (chosen, found.chosen) == (YARN, "yarn")


numbers = st.lists(st.floats(-0.5, 0.5), min_size=6, max_size=6)


@given(numbers, numbers, numbers, numbers, numbers)
def test_no_kind_is_clearly_worse_than_the_published_methods(result, two, one, start, pro):
    """Or the result is such a method."""
    _, found, _ = run(result=result, two=two, one=one, start=start, pro=pro)
    assert found.gain >= (found.gain_standard_error if "way" in found.chosen else 0) - 1e-12
    if found.chosen in ("yarn", "mrrope-pro"):
        return
    for method in ("yarn", "mrrope-pro"):
        differences = np.subtract(found.losses[found.chosen], found.losses[method]).reshape(3, 2)
        spread = math.sqrt(differences.var(axis=1, ddof=1).mean() / 2)
        assert (differences.mean(axis=1) <= max(0.01, 2 * spread) + 1e-9).all()


def test_a_single_kind_is_enough():
    losses = {RESULT: [2.9, 2.8], START: [3.0, 3.0]}
    chosen, found = validate(lambda r: losses[r], (OWN, OWN), RESULT, ("original", START), {})
    assert (chosen, found.chosen, found.gain) == (RESULT, "result", pytest.approx(0.15))
    assert found.gain_standard_error == pytest.approx(0.05)
    one = validate(lambda r: losses[r][:1], (OWN,), RESULT, ("original", START), {})[1]
    assert one.gain_standard_error is None
    assert dataclasses.asdict(one)["gains"] == {OWN: pytest.approx(0.1)}


def test_an_interrupted_validation_resumes_and_measures_nothing_twice(tmp_path, monkeypatch):
    """On the bundled model: the losses are those of the objective, the files those of one run."""
    loaded = load_model("bundled")
    config = GradientSearchConfig(windows=2, validation_windows=2, budget=5)

    def search(out):
        options = SearchOptions("2x", tmp_path / out, ("python-library",), config=config)
        return run_search(loaded, options, Ranks())

    whole, measured = search("whole"), []

    def failing(forward, windows):
        if len(windows) == 1:
            measured.append(windows)
        if len(measured) == 25:  # in the third candidate, of 2 + 8 windows each
            raise KeyboardInterrupt
        return window_losses(forward, windows)

    with monkeypatch.context() as patched:
        patched.setattr("longrope.search.run.window_losses", failing)
        with pytest.raises(KeyboardInterrupt):
            search("cut")
    before = len((tmp_path / "cut/validation.jsonl").read_text().splitlines())
    assert before == 2
    resumed = search("cut")
    assert resumed.computed == 0
    assert (resumed.best, resumed.validation) == (whole.best, whole.validation)
    for name in ("rescale.json", "portable.json", "validation.jsonl", "history.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert whole.validation is not None
    assert whole.validation.kinds == (OWN, OWN, *(k for k in kinds.KINDS for _ in range(2)))
    assert whole.gain == whole.validation.gain
    saved = Rescale.load(tmp_path / "whole/rescale.json")
    assert saved.provenance["validated"]["gain"] == whole.gain
    assert len(whole.best.searched_documents) >= 4  # searched and validated on


def test_without_transfer_a_search_is_what_it_was(tmp_path):
    loaded = load_model("bundled")
    config = GradientSearchConfig(windows=2, budget=5, transfer="none")
    options = SearchOptions("2x", tmp_path, ("python-library",), config=config)
    found = run_search(loaded, options, Ranks())
    assert found.validation is None
    assert not (tmp_path / "validation.jsonl").exists()
    assert len(found.best.searched_documents) == 2
