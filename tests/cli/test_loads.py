"""Each verb inspects its model once, and loads its weights at most once."""

import pytest

from conftest import pair
from gguf_model import write_gguf
from longrope.checkpoints.export import ExportOptions, export
from longrope.cli.app import app
from longrope.distributed import Ranks
from longrope.models import info, load
from longrope.pipeline.extend import extend
from longrope.pipeline.recipe import make_recipe


@pytest.fixture
def counts(monkeypatch):
    """How many meta models were built, and how many models were loaded, since the test began."""
    found = {"inspected": 0, "loaded": 0}
    build, read = info.build_meta_model, load.read_pretrained

    def counted_build(*args):
        found["inspected"] += 1
        return build(*args)

    def counted_read(auto, *args, **kwargs):
        found["loaded"] += hasattr(auto, "_model_mapping")
        return read(auto, *args, **kwargs)

    monkeypatch.setattr(info, "build_meta_model", counted_build)
    monkeypatch.setattr(load, "read_pretrained", counted_read)
    return found


def go(*arguments):
    app([str(argument) for argument in arguments], standalone_mode=False)


def test_export(checkpoints, micro_models, tmp_path, counts):
    made = pair(micro_models("llama"))
    made.long.save(tmp_path / "long.json")
    made.short.save(tmp_path / "short.json")
    factors = ["--long-factors", tmp_path / "long.json", "--short-factors", tmp_path / "short.json"]
    go("export", checkpoints("llama"), "--out", tmp_path / "out", *factors)
    assert counts == {"inspected": 1, "loaded": 0}


def test_export_of_another_format(checkpoints, micro_models, tmp_path, counts):
    write_gguf(micro_models("llama"), tmp_path / "model.gguf")
    export(
        ExportOptions(
            str(tmp_path / "model.gguf"),
            tmp_path / "out",
            long_factors="yarn",
            target="512",
        )
    )
    assert counts == {"inspected": 1, "loaded": 1}


def test_search_and_evaluate(checkpoints, texts, tmp_path, counts):
    model, data = checkpoints("llama"), ["--data", texts, "--device", "cpu"]
    search = ["--target", "2x", "--out", tmp_path / "out", "--windows", 1, "--budget", 6]
    go("search", model, *search, *data)
    assert counts == {"inspected": 1, "loaded": 1}
    go("evaluate", "perplexity", model, "--lengths", "64", "--tokens-per-document", 64, *data)
    assert counts == {"inspected": 2, "loaded": 2}


def test_compare(checkpoints, texts, tmp_path, counts):
    comparison = ["--target", "2x", "--methods", "none,yarn", "--tokens-per-document", 128]
    data = ["--data", texts, "--device", "cpu", "--out", tmp_path]
    go("compare", checkpoints("llama"), *comparison, *data)
    assert counts == {"inspected": 1, "loaded": 1}


def test_extend(checkpoints, texts, tmp_path, counts):
    recipe = make_recipe(
        {
            "model": str(checkpoints("llama")),
            "target": "2x",
            "data": [str(texts)],
            "execution": {"device": "cpu"},
            "search": {"method": "yarn"},
            "evaluate": {"documents": 1, "lengths": ["64"], "passkey_trials": 0, "methods": []},
        }
    )
    extend(recipe, tmp_path / "out", Ranks())
    assert counts == {"inspected": 1, "loaded": 1}
