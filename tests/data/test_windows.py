import os
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from longrope.data.documents import Document
from longrope.data.windows import (
    TokenDocument,
    check_documents,
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


def test_a_document_that_begins_with_bos_has_no_second_one(tokenizer):
    """A chat template writes it into the text."""
    texts = [
        "import os\n",
        "<|bos|>import os\n",
        "<|bos|><|bos|>import os\n",
        "a<|bos|>b",
        "<|bos|>",
    ]
    plain, *begun, within, alone = tokenize([Document(t, t) for t in texts], tokenizer)
    for document in begun:
        assert document.ids.tolist() == plain.ids.tolist()
    assert within.ids.tolist().count(tokenizer.bos_token_id) == 1
    assert len(alone) == 0


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


def as_floats(file):
    arrays = load_file(file)
    save_file(arrays | {"ids": arrays["ids"].astype(np.float32) / 3}, file)


def other_tokens(file):
    """Whole and of the right kind, but of another text, under this one's name."""
    arrays = load_file(file)
    save_file(arrays | {"ids": arrays["ids"][::-1].copy()}, file)


def one_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        as_floats,
        other_tokens,
        one_bit,
        lambda file: file.write_bytes(file.read_bytes()[:20]),
        lambda file: file.write_bytes(b""),
        lambda file: save_file({"ids": np.zeros(3, np.int32)}, file),
    ],
    ids=["floats", "other tokens", "one bit", "cut short", "empty", "no lengths"],
)
def test_a_damaged_cache_is_made_again(tokenizer, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("LONGROPE_CACHE", str(tmp_path))
    documents = [Document("a", "def f(x): return 12"), Document("b", "import os")]
    expected = [tokenizer(d.text, add_special_tokens=False)["input_ids"] for d in documents]
    tokenize(documents, tokenizer)
    (file,) = (tmp_path / "tokens").iterdir()
    whole = file.read_bytes()
    damage(file)
    found = tokenize(documents, tokenizer)
    assert [d.ids.tolist() for d in found] == expected
    assert {d.ids.dtype for d in found} == {np.dtype(np.int32)}
    assert file.read_bytes() == whole  # written again


def test_a_cache_under_the_name_of_another_is_made_again(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("LONGROPE_CACHE", str(tmp_path))
    tokenize([Document("a", "import sys")], tokenizer)
    (other,) = (tmp_path / "tokens").iterdir()
    tokenize([Document("b", "import os!")], tokenizer)
    (file,) = {*(tmp_path / "tokens").iterdir()} - {other}
    shutil.copy(other, file)
    (found,) = tokenize([Document("b", "import os!")], tokenizer)
    assert tokenizer.decode(found.ids) == "import os!"


def full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["a file", "full"])
def test_tokens_need_no_cache(tokenizer, tmp_path, monkeypatch, caplog, where):
    """One warning, however many batches there are."""
    monkeypatch.setattr("longrope.data.windows._BATCH", 20)
    cache = tmp_path / "cache"
    if where == "full":
        monkeypatch.setattr(os, "fsync", full)
    else:
        cache.write_text("")
    monkeypatch.setenv("LONGROPE_CACHE", str(cache))
    documents = [Document(str(n), f"def f{n}(x): return {n}") for n in range(9)]
    found = tokenize(documents, tokenizer)
    assert [tokenizer.decode(d.ids) for d in found] == [d.text for d in documents]
    (record,) = caplog.records
    assert "LONGROPE_CACHE" in record.getMessage()


@pytest.mark.parametrize(
    ("home", "cache", "expected"),
    [
        ("HOME", None, "HOME/.cache/longrope/tokens"),
        ("HOME", "", "HOME/.cache/longrope/tokens"),
        ("HOME", "HOME/given", "HOME/given/tokens"),
        ("HOME", "~/given", "HOME/given/tokens"),
        ("", None, None),
        (None, None, None),
        (None, "HOME/given", "HOME/given/tokens"),
    ],
)
def test_where_the_cache_is(tokenizer, tmp_path, monkeypatch, home, cache, expected):
    """A user without a home directory, and empty variables: nothing beside the given places."""

    def unknown(_):
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", unknown)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name, value in (("HOME", home), ("LONGROPE_CACHE", cache)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value.replace("HOME", str(tmp_path)))
    (found,) = tokenize([Document("a", "import os")], tokenizer)
    assert tokenizer.decode(found.ids) == "import os"
    written = [file.parent for file in tmp_path.rglob("*.safetensors")]
    assert list(map(str, written)) == (
        [expected.replace("HOME", str(tmp_path))] if expected else []
    )


def test_single_digits(tokenizer):
    ids = tokenizer("12345", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in ids] == list("12345")


@given(
    sizes=st.lists(st.integers(0, 400), min_size=1, max_size=8),
    length=st.integers(2, 120),
    samples=st.integers(1, 9),
    seed=st.integers(0, 5),
    bos=st.sampled_from([[], [999_999], [999_998, 999_999]]),
)
def test_search_windows(sizes, length, samples, seed, bos):
    documents = [document(f"d{i}", n) for i, n in enumerate(sizes)]
    usable = [d for d in documents if len(d) >= length]
    if not usable:
        with pytest.raises(ValueError, match=f"must have {length:,},"):
            search_windows(documents, length, samples, seed, bos)
        return
    windows = search_windows(documents, length, samples, seed, bos)
    assert windows.ids.shape[1] == length + len(bos)
    assert 1 <= len(windows.ids) <= samples
    # Half of the usable documents stay unseen, and the choice does not hang on their order.
    assert len(windows.documents) <= (len(usable) + 1) // 2
    again = search_windows(documents[::-1], length, samples, seed, bos)
    assert np.array_equal(windows.ids, again.ids)
    body = windows.ids[:, len(bos) :]
    assert (np.diff(body, axis=1) % 1000 == 1).all()  # consecutive tokens of one document
    assert (windows.ids[:, : len(bos)] == bos).all()
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
    asked = {"length": 20, "samples": samples, "seed": 0, "bos": [], "spare_half": spare_half}
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
    windows = search_windows(documents, 20, 2, 0, [], validation=3)
    searched, unseen = (
        {row[0] // 1000 for row in rows} for rows in (windows.ids, windows.validation)
    )
    assert (len(searched), len(unseen)) == (2, 2)  # of the half of the documents
    assert not searched & unseen


def test_too_few_tokens_says_how_many_and_what_to_do():
    with pytest.raises(
        ValueError, match=r"must have 2,048, .* has 300 \(500 in all\).*`data`.*pack=True"
    ):
        search_windows([document("a", 300), document("b", 200)], 2048, 5, 0, [])


def test_pack_joins_with_bos_and_eos():
    packed = pack([document("a", 3), document("b", 2)], bos=[7], eos=8)
    assert packed.ids.tolist() == [7, 0, 1, 2, 8, 7, 0, 1, 8]
    assert packed.sha256 == ("a", "b")
    assert pack([document("a", 2)], [], None).ids.tolist() == [0, 1]


def test_unseen_is_disjoint():
    documents = [document(name, 5) for name in "abc"]
    assert [d.name for d in exclude_documents(documents, ["b"])] == ["a", "c"]
    packed = pack(documents[:2], [], None)
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


def test_documents_outside_the_embeddings_are_named():
    documents = [document("a", 5), TokenDocument("b", ("b",), np.array([3, 1000], np.int32))]
    check_documents(documents, 1001, (0, None))
    with pytest.raises(ValueError, match=r"^b: token id 1,000 .* of 1,000 tokens.*<pad>"):
        check_documents(documents, 1000)
    with pytest.raises(ValueError, match=r"BOS or EOS .*token id 1,001"):
        check_documents(documents, 1001, (None, 1001))
