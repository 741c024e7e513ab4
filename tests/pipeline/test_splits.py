"""No document serves two purposes, whatever is given and in whatever order."""

import itertools

import pytest

from longrope.models.load import load_model
from longrope.pipeline.recipe import make_recipe
from longrope.pipeline.splits import split_documents


@pytest.fixture(scope="module")
def bundled():
    return load_model("bundled")


def hashes(documents):
    return {digest for document in documents for digest in document.sha256}


def splits(bundled, target=2048, **content):
    return split_documents(
        bundled.tokenizer,
        make_recipe({"target": "8x", **content}),
        target,
        trained=min(target, 256),
    )


def disjoint(made):
    parts = [hashes(part) for part in (made.search, made.training, made.evaluation)]
    assert all(parts)
    return all(not a & b for a, b in itertools.combinations(parts, 2))


def test_of_the_library(bundled):
    held_out = ["python-library-held-out"]
    made = splits(bundled, data=["python-library"], eval_data=held_out)
    assert disjoint(made)
    assert {"asyncio", "email"} <= {document.name for document in made.evaluation}
    assert sum(map(len, made.training)) > sum(map(len, made.search))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_of_documents_given(bundled, texts, seed):
    made = splits(bundled, target=512, data=[str(texts)], seed=seed)
    assert disjoint(made)


def test_order_does_not_matter(bundled, texts):
    files = [str(path) for path in sorted(texts.glob("*.txt"))]
    one, other = (splits(bundled, target=512, data=order) for order in (files, files[::-1]))
    for name in ("search", "training", "evaluation"):
        assert hashes(getattr(one, name)) == hashes(getattr(other, name))


def test_what_is_evaluated_on_is_never_trained_on(bundled, texts):
    """The same file given for both goes to evaluation alone."""
    file = str(sorted(texts.glob("*.txt"))[0])
    made = splits(bundled, target=512, data=[str(texts)], eval_data=[file])
    assert disjoint(made)
    assert len(made.evaluation) == 1
    with pytest.raises(ValueError, match="all documents of `data` are in `eval_data` too"):
        splits(bundled, target=512, data=[file], eval_data=[str(texts)])


def test_short_documents_are_joined(bundled, texts):
    made = splits(bundled, target=512, data=[str(texts)])
    longest = sum(map(len, made.search))
    windows = made.search_windows(longest, 1, seed=0)
    assert windows.ids.shape == (1, longest + 1)  # with BOS


def test_nothing_left_to_train_on(bundled, texts, tmp_path):
    (tmp_path / "short.txt").write_text("import os\n" * 300)  # too short for two spans
    other = str(sorted(texts.glob("*.txt"))[1])
    with pytest.raises(ValueError, match="train on: 0 of"):
        splits(bundled, target=512, data=[str(tmp_path)], eval_data=[other])


def test_text_must_be_named(bundled):
    with pytest.raises(ValueError, match="data is missing"):
        splits(bundled)


@pytest.mark.parametrize("documents", [1, 2])
def test_one_large_file_is_enough(bundled, tmp_path, documents, caplog):
    """It is cut into spans with a gap between, and no two purposes see the same part."""
    words = [f"word{number}" for number in range(9000)]
    for part in range(documents):
        (tmp_path / f"{part}.txt").write_text(" ".join(words[part::documents]))
    made = splits(bundled, target=512, data=[str(tmp_path)])
    parts = {name: getattr(made, name) for name in ("search", "training", "evaluation")}
    assert all(sum(map(len, part)) >= 512 for part in parts.values())
    own = [{document.sha256[-1] for document in part} for part in parts.values()]
    assert not any(a & b for a, b in itertools.combinations(own, 2))
    seen = {}
    for name, part in parts.items():
        for document in part:
            for start in range(len(document) - 20):
                window = tuple(document.ids[start : start + 20].tolist())
                assert seen.setdefault(window, name) == name
    assert caplog.text.count("spans, 512 tokens apart") == documents
    again = splits(bundled, target=512, data=[str(tmp_path)])
    assert all(hashes(getattr(again, name)) == hashes(part) for name, part in parts.items())


def test_a_small_file_is_not_enough(bundled, tmp_path):
    (tmp_path / "short.txt").write_text("word " * 700)
    with pytest.raises(ValueError, match="needs 512"):
        splits(bundled, target=512, data=[str(tmp_path)])
