"""What a comparison leaves out."""

import hashlib

import pytest

from longrope.evaluate.compare import method_entries, perplexity_documents
from longrope.models.info import inspect_model
from longrope.models.load import load_tokenizer


def test_documents_that_a_search_used_are_left_out(tmp_path):
    texts = {"a.txt": "alpha", "b.txt": "beta"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    data = [str(tmp_path / name) for name in texts]
    digest = hashlib.sha256(b"alpha").hexdigest()
    searched = inspect_model("bundled").rescale("pi", 512).replace(provenance={})
    searched.replace(searched_documents=(digest,)).save(tmp_path / "rescale.json")
    tokenizer = load_tokenizer("bundled", False)
    asked = {"field": "text", "pack": False}
    methods = ["yarn", str(tmp_path / "rescale.json")]

    def names(sources, exclude=True):
        found = perplexity_documents(tokenizer, sources, methods, exclude=exclude, **asked)
        return [document.name for document in found]

    assert names(data) == ["b.txt"]
    assert names(data, exclude=False) == ["a.txt", "b.txt"]
    with pytest.raises(ValueError, match="`data`"):
        names(data[:1])


@pytest.mark.parametrize("method", ["none", "yarn"])
@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 0.0, -1.0])
def test_an_attention_factor_that_is_no_factor_is_refused(factor, method):
    with pytest.raises(ValueError, match=f"attention_factor is {factor}"):
        method_entries(inspect_model("bundled"), [method], 512, attention_factor=factor)
