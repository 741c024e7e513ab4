import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from longrope.data.documents import Document
from longrope.data.windows import (
    TokenDocument,
    bos_token,
    exclude_documents,
    pack,
    search_windows,
    tokenize,
)
from longrope.models.bundled import BUNDLED
from longrope.units import parse_length


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED)


def document(name: str, tokens: int) -> TokenDocument:
    return TokenDocument(name, (name,), np.arange(tokens, dtype=np.int32) % 1000)


def test_tokens_are_cached_and_exact(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("LONGROPE_CACHE", str(tmp_path))
    documents = [Document("a", "def f(x): return 12"), Document("b", "import os")]
    monkeypatch.setattr("longrope.data.windows._BATCH", 20)  # each in a batch of its own
    first = tokenize(documents, tokenizer)
    assert tokenizer.decode(first[0].ids) == documents[0].text
    assert tokenizer.bos_token_id not in first[0].ids
    files = sorted((tmp_path / "tokens").iterdir())
    assert len(files) == 2

    def forbidden(*_, **__):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(type(tokenizer), "__call__", forbidden)
    again = tokenize(documents, tokenizer)
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(first, again, strict=True))


def test_many_small_documents_share_batches(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LONGROPE_CACHE", str(tmp_path))
    monkeypatch.setattr("longrope.data.windows._BATCH", 2000)
    documents = [Document(str(n), f"def f{n}(x): return {n}") for n in range(1000)]
    found = tokenize(documents, tokenizer)
    for document, tokens in zip(documents, found, strict=True):
        alone = tokenizer(document.text, add_special_tokens=False)["input_ids"]
        assert (tokens.name, tokens.ids.tolist()) == (document.name, alone)
    assert 10 <= len(list((tmp_path / "tokens").iterdir())) <= 20
    assert "tokenize 1000/1000" in capsys.readouterr().err


def test_a_damaged_cache_is_made_again(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("LONGROPE_CACHE", str(tmp_path))
    documents = [Document("a", "def f(x): return 12")]
    first = tokenize(documents, tokenizer)
    (file,) = (tmp_path / "tokens").iterdir()
    file.write_bytes(file.read_bytes()[:20])
    assert np.array_equal(tokenize(documents, tokenizer)[0].ids, first[0].ids)


def test_single_digits(tokenizer):
    ids = tokenizer("12345", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in ids] == list("12345")


def test_bos_is_what_the_tokenizer_adds(tokenizer):
    assert bos_token(tokenizer) == tokenizer.bos_token_id == tokenizer("x")["input_ids"][0]


@given(
    sizes=st.lists(st.integers(0, 400), min_size=1, max_size=8),
    length=st.integers(2, 120),
    samples=st.integers(1, 9),
    seed=st.integers(0, 5),
    bos=st.sampled_from([None, 999_999]),
)
def test_search_windows(sizes, length, samples, seed, bos):
    documents = [document(f"d{i}", n) for i, n in enumerate(sizes)]
    usable = [d for d in documents if len(d) >= length]
    if not usable:
        with pytest.raises(ValueError, match=f"must have {length:,},"):
            search_windows(documents, length, samples, seed, bos)
        return
    windows = search_windows(documents, length, samples, seed, bos)
    assert windows.ids.shape[1] == length + (bos is not None)
    assert 1 <= len(windows.ids) <= samples
    # Half of the usable documents stay unseen, and the choice does not hang on their order.
    assert len(windows.documents) <= (len(usable) + 1) // 2
    again = search_windows(documents[::-1], length, samples, seed, bos)
    assert np.array_equal(windows.ids, again.ids)
    body = windows.ids[:, 1:] if bos is not None else windows.ids
    assert (np.diff(body, axis=1) % 1000 == 1).all()  # consecutive tokens of one document
    if bos is not None:
        assert (windows.ids[:, 0] == bos).all()
    available = sum(len(d) // length for d in windows.documents)
    assert len(windows.ids) == min(samples, available)


@given(
    sizes=st.lists(st.integers(20, 400), min_size=1, max_size=8),
    samples=st.integers(1, 6),
    validation=st.integers(1, 6),
    spare_half=st.booleans(),
)
def test_validation_windows_are_not_searched(sizes, samples, validation, spare_half):
    documents = [document(f"d{i}", n) for i, n in enumerate(sizes)]
    for number, each in enumerate(documents):
        each.ids[:] += 1000 * number
    asked = {"length": 20, "samples": samples, "seed": 0, "bos": None, "spare_half": spare_half}
    without = search_windows(documents, **asked)
    windows = search_windows(documents, **asked, validation=validation)
    searched = {int(i) for row in windows.ids for i in row}
    assert not searched & {int(i) for row in windows.validation for i in row}
    assert windows.validation.shape[1] == 20
    assert len(without.validation) == 0
    # The search keeps its windows, but for a third at most where there is too little text.
    kept = len(windows.ids)
    assert np.array_equal(windows.ids, without.ids[:kept])
    assert kept >= len(without.ids) - len(without.ids) // 3
    if kept < len(without.ids):
        assert len(windows.validation) <= validation
    if kept == samples and len(windows.validation) < validation:
        assert len(without.ids) < 3
    names = {document.name for document in windows.documents}
    used = {f"d{i // 1000}" for row in (*windows.ids, *windows.validation) for i in row.tolist()}
    if len(documents) > 1:
        assert names == used


def test_validation_prefers_other_documents():
    documents = [document(f"d{i}", 100) for i in range(8)]
    for number, each in enumerate(documents):
        each.ids[:] += 1000 * number
    windows = search_windows(documents, 20, 2, 0, None, validation=3)
    searched, unseen = (
        {row[0] // 1000 for row in rows} for rows in (windows.ids, windows.validation)
    )
    assert (len(searched), len(unseen)) == (2, 2)  # of the half of the documents
    assert not searched & unseen


def test_too_few_tokens_says_how_many_and_what_to_do():
    with pytest.raises(
        ValueError, match=r"must have 2,048, .* has 300 \(500 in all\).*`data`.*pack=True"
    ):
        search_windows([document("a", 300), document("b", 200)], 2048, 5, 0, None)


def test_pack_joins_with_bos_and_eos():
    packed = pack([document("a", 3), document("b", 2)], bos=7, eos=8)
    assert packed.ids.tolist() == [7, 0, 1, 2, 8, 7, 0, 1, 8]
    assert packed.sha256 == ("a", "b")
    assert pack([document("a", 2)], None, None).ids.tolist() == [0, 1]


def test_unseen_is_disjoint():
    documents = [document(name, 5) for name in "abc"]
    assert [d.name for d in exclude_documents(documents, ["b"])] == ["a", "c"]
    packed = pack(documents[:2], None, None)
    assert [d.name for d in exclude_documents([packed, documents[2]], ["a"])] == ["c"]


@pytest.mark.parametrize(
    ("text", "length"),
    [("131072", 131072), ("128k", 131072), ("8x", 2048), ("1.5k", 1536), ("2M", 2**21)],
)
def test_lengths(text, length):
    assert parse_length(text, 256) == length


@pytest.mark.parametrize("text", ["", "x", "-5", "8y", "0", "nan", "inf", "1e40"])
def test_no_lengths(text):
    with pytest.raises(ValueError, match=r"invalid length .*131072, 128k or 8x"):
        parse_length(text, 256)


def test_lengths_are_whole():
    assert parse_length("1.1x", 1000) == 1100  # in floats a little more
    with pytest.raises(ValueError, match=r"'1\.1x': 281\.6 tokens"):
        parse_length("1.1x", 256)
