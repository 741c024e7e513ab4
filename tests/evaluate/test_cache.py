"""What was measured is not measured again, unless it is of something else."""

import dataclasses
import os

import numpy as np
import pytest

from longrope.data.windows import load_documents
from longrope.evaluate.cache import MeasurementCache, measurement_cache
from longrope.evaluate.compare import compare_perplexity, method_entries
from longrope.evaluate.measure import (
    Measurement,
    PerplexityConfig,
    RetrievalConfig,
    measure,
    model_identity,
)
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


def compared(bundled, texts, directory, methods, lengths=(256, 512), **options):
    return compare_perplexity(
        bundled,
        method_entries(bundled.info, methods, 512),
        512,
        load_documents(bundled.tokenizer, [str(texts)]),
        PerplexityConfig(lengths=lengths, **{"tokens_per_document": 1024, **options}),
        MeasurementCache(directory),
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
    compared(bundled, texts, tmp_path, ("none", "pi"), stride=128, lengths=(512,))
    assert sum(forwards) > known


def test_a_damaged_file_is_measured_again(bundled, texts, tmp_path, forwards):
    first = compared(bundled, texts, tmp_path, ("none",))
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    measured = sum(forwards)
    assert compared(bundled, texts, tmp_path, ("none",)).to_json() == first.to_json()
    assert measured < sum(forwards) < 2 * measured


def test_answers(bundled, tmp_path, forwards):
    model = model_identity(bundled)

    def asked(seed=0, method="yarn"):
        rescale, options = bundled.info.rescale(method, 512), RetrievalConfig(trials=4, seed=seed)
        cache = MeasurementCache(tmp_path)
        return [
            measure(bundled, Measurement("passkey", model, lambda _: rescale, n, options), cache)
            for n in (256, 512)
        ]

    first, measured = asked(), len(forwards)
    assert asked() == first
    assert len(forwards) == measured
    asked(seed=1)
    assert len(forwards) == 2 * measured
    asked(method="pi")
    assert len(forwards) == 3 * measured


def test_a_stopped_measurement_resumes_within(bundled, texts, tmp_path, monkeypatch):
    """Per document and per question, in the cache that every verb uses."""
    yarn, documents = (
        bundled.info.rescale("yarn", 512),
        load_documents(bundled.tokenizer, [str(texts)]),
    )
    wanted = [
        Measurement(
            "perplexity", "m", lambda _: yarn, 256, PerplexityConfig(lengths=(256,)), documents
        ),
        Measurement("passkey", "m", lambda _: yarn, 256, RetrievalConfig(trials=6)),
        Measurement("needle", "m", lambda _: yarn, 256, RetrievalConfig(trials=6), documents),
    ]
    expected = [measure(bundled, one, MeasurementCache()) for one in wanted]
    monkeypatch.setattr("longrope.evaluate.retrieval.BATCH_TOKENS", 256)
    own, counted = LongForward._hidden, []

    def hidden(self, ids_BT, *args):
        if len(counted) == most:
            raise KeyboardInterrupt
        counted.append(len(ids_BT))
        return own(self, ids_BT, *args)

    monkeypatch.setattr(LongForward, "_hidden", hidden)
    for one, plain in zip(wanted, expected, strict=True):
        most = 10_000
        counted.clear()
        measure(bundled, one, MeasurementCache())
        whole, most = sum(counted), len(counted) - 1
        counted.clear()
        with pytest.raises(KeyboardInterrupt):
            measure(bundled, one, MeasurementCache(tmp_path))
        begun, most = sum(counted), 10_000
        counted.clear()
        found = measure(bundled, one, MeasurementCache(tmp_path))
        assert 0 < sum(counted) <= whole - begun + 1
        if one.kind == "perplexity":
            assert found.perplexity == plain.perplexity
        else:
            assert found == plain


def test_the_key_is_of_the_content():
    rescale = load_model("bundled").info.rescale("yarn", 512)
    plain = Measurement("passkey", "a", lambda _: rescale, 256, RetrievalConfig(trials=4))
    same = Measurement("passkey", "a", lambda length: rescale, 256, RetrievalConfig(trials=4)).key
    others = [
        dataclasses.replace(plain, options=RetrievalConfig(trials=5)),
        dataclasses.replace(plain, model="b"),
        dataclasses.replace(plain, kind="needle"),
        dataclasses.replace(plain, choose=lambda _: rescale.replace(attention_factor=2.0)),
    ]
    assert plain.key == same
    assert len({same, *(other.key for other in others)}) == 5


def test_other_weights_are_another_measurement(bundled, texts, tmp_path, forwards):
    other = load_model("bundled")
    other.model.get_input_embeddings().weight.data[:, 0] += 1
    forwards.clear()  # of the model's proof
    compared(bundled, texts, tmp_path, ("none",))
    measured = sum(forwards)
    compared(other, texts, tmp_path, ("none",))
    assert sum(forwards) == 2 * measured


def test_finished_measurements_go_and_those_of_others_stay(tmp_path):
    def stopped():
        with measurement_cache(tmp_path) as cache:
            cache.answers("passkey-1")["0"] = True
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    for place in (tmp_path, tmp_path / "unfinished"):  # of a process that was killed in a write
        temporary = place / f".compare.json.longrope-tmp-{os.getpid()}"
        temporary.touch()
        os.utime(temporary, (1, 1))
    with measurement_cache(tmp_path) as cache:
        cache.answers("needle-1")["0"] = True
        cache.losses("perplexity-1")["a"] = np.zeros((1, 2))
        with pytest.raises(ValueError, match="another process"), measurement_cache(tmp_path):
            pass
    with measurement_cache(tmp_path) as cache:
        assert cache.answers("passkey-1") == {"0": True}
        assert cache.answers("needle-1") == {}
        assert cache.losses("perplexity-1") == {}
    assert not list(tmp_path.iterdir())


def test_nothing_is_stored_without_a_directory_or_with_a_group(tmp_path):
    for directory, group_size in ((None, 1), (tmp_path, 2)):
        with measurement_cache(directory, group_size) as cache:
            cache.losses("perplexity-1")["a"] = np.zeros((1, 2))
            cache.answers("passkey-1")["a"] = True
    assert not list(tmp_path.iterdir())
