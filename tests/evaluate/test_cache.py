"""What was measured is not measured again, unless it is of something else."""

import numpy as np
import pytest

from longrope.evaluate.ask import AskOptions, ask
from longrope.evaluate.cache import MeasurementCache, measurement_cache
from longrope.evaluate.compare import run_comparison
from longrope.evaluate.options import CompareOptions
from longrope.layerwise.forward import LongForward
from longrope.models.load import load_model


@pytest.fixture(scope="module")
def bundled():
    return load_model("bundled")


@pytest.fixture
def forwards(monkeypatch):
    """How many windows went through the long forward."""
    own, counted = LongForward._hidden, []

    def hidden(self, ids_BT, *args):
        counted.append(len(ids_BT))
        return own(self, ids_BT, *args)

    monkeypatch.setattr(LongForward, "_hidden", hidden)
    return counted


def compared(bundled, texts, directory, methods, **changes):
    fields = {"lengths": ("256", "512"), "data": (str(texts),), "target": "512", **changes}
    return run_comparison(
        bundled,
        CompareOptions(methods, **fields),
        exclude_searched=False,
        unfinished=MeasurementCache(directory),
    )


def test_losses(bundled, texts, tmp_path, forwards):
    first = compared(bundled, texts, tmp_path, ("none", "pi"))
    measured = sum(forwards)
    again = compared(bundled, texts, tmp_path, ("none", "pi"))
    assert sum(forwards) == measured
    assert again.to_json() == first.to_json()
    # Another method is measured alone, another cut of the documents anew.
    compared(bundled, texts, tmp_path, ("none", "pi", "ntk"))
    assert sum(forwards) == measured + measured // 2
    compared(bundled, texts, tmp_path, ("none", "pi"), tokens_per_document=512)
    assert sum(forwards) > measured + measured // 2
    known = sum(forwards)
    compared(bundled, texts, tmp_path, ("none", "pi"), stride=128, lengths=("512",))
    assert sum(forwards) > known


def test_a_damaged_file_is_measured_again(bundled, texts, tmp_path, forwards):
    first = compared(bundled, texts, tmp_path, ("none",))
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    measured = sum(forwards)
    assert compared(bundled, texts, tmp_path, ("none",)).to_json() == first.to_json()
    assert measured < sum(forwards) < 2 * measured


def test_answers(bundled, tmp_path, forwards):
    def asked(seed=0, method="yarn"):
        options = AskOptions("passkey", ("256", "512"), trials=4, seed=seed)
        rescale = bundled.info.rescale(method, 512)
        return ask(bundled, options, lambda length: rescale, MeasurementCache(tmp_path))

    first, measured = asked(), len(forwards)
    assert asked() == first
    assert len(forwards) == measured
    asked(seed=1)
    assert len(forwards) == 2 * measured
    asked(method="pi")
    assert len(forwards) == 3 * measured


def test_other_weights_are_another_measurement(bundled, texts, tmp_path, forwards):
    other = load_model("bundled")
    other.model.get_input_embeddings().weight.data[:, 0] += 1
    forwards.clear()  # of the model's proof
    compared(bundled, texts, tmp_path, ("none",))
    measured = sum(forwards)
    compared(other, texts, tmp_path, ("none",))
    assert sum(forwards) == 2 * measured


def test_what_is_done_goes_and_what_others_left_stays(bundled, texts, tmp_path):
    rescale = bundled.info.rescale("yarn", 512)

    def stopped():
        with measurement_cache(tmp_path) as unfinished:
            unfinished.answers(bundled, [rescale], kind="passkey")["0"] = True
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with measurement_cache(tmp_path) as unfinished:
        unfinished.answers(bundled, [rescale], kind="needle")["0"] = True
        unfinished.losses(bundled, rescale)["a"] = np.zeros((1, 2))
        with pytest.raises(ValueError, match="another process"), measurement_cache(tmp_path):
            pass
    with measurement_cache(tmp_path) as unfinished:
        assert unfinished.answers(bundled, [rescale], kind="passkey") == {"0": True}
        assert unfinished.answers(bundled, [rescale], kind="needle") == {}
        assert unfinished.losses(bundled, rescale) == {}
    assert not list(tmp_path.iterdir())


def test_nothing_is_kept_without_a_directory_or_with_a_group(bundled, tmp_path):
    rescale = bundled.info.rescale("yarn", 512)
    for directory, group_size in ((None, 1), (tmp_path, 2)):
        with measurement_cache(directory, group_size) as unfinished:
            unfinished.losses(bundled, rescale)["a"] = np.zeros((1, 2))
            unfinished.answers(bundled, [rescale])["a"] = True
    assert not list(tmp_path.iterdir())
