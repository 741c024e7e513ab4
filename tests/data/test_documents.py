import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope.data.documents import check_sources, documents_of, read_documents
from longrope.data.stdlib import HELD_OUT

KINDS = ("txt", "md", "json", "jsonl", "csv", "parquet")
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5022784\n"


def test_lines_of_windows_end_as_others(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n\r\nthree\r")
    (document,) = read_documents([str(tmp_path)], field="text")
    assert document.text == "one\ntwo\n\nthree\r"


def test_reads_every_kind(tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "a.txt").write_text("alpha")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.md").write_text("beta")
    (tmp_path / "folder" / ".hidden").write_text("hidden")
    (tmp_path / "c.jsonl").write_text(
        "\n".join(json.dumps({"body": text}) for text in ("gamma", "delta")) + "\n\n"
    )
    parquet.write_table(pyarrow.table({"body": ["epsilon", "alpha"]}), tmp_path / "d.parquet")
    sources = [str(tmp_path / name) for name in ("a.txt", "folder", "c.jsonl", "d.parquet")]
    texts = [document.text for document in read_documents(sources, field="body")]
    assert texts == ["alpha", "beta", "gamma", "delta", "epsilon"]  # the second alpha is the first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b" \n", "empty.txt is empty"),
        *((f"p.{kind}", LFS_POINTER, "LFS pointer.*git lfs pull") for kind in KINDS),
        ("binary.txt", b"\x00\x01\xff", "binary.txt .*UTF-8"),
        ("latin.txt", "é".encode("latin-1"), "latin.txt .*UTF-8"),
        ("x.jsonl", b'{"text": 1}\n', "x.jsonl: row 1 .*int .*'text'.*`field`"),
        ("x.jsonl", b"[1]\n", "x.jsonl: row 1 .*object"),
        ("x.jsonl", b"{\n", "x.jsonl: line 1 .*JSON"),
        ("x.jsonl", b'{"other": "a"}\n', r"no field 'text'.*`field` .*: other"),
        ("x.parquet", b"PAR1", "x.parquet .*Parquet"),
        ("blank.jsonl", b'{"text": " "}\n', r"data='.*blank.jsonl' .*no text"),
        ("x.json", b'{"a": [1],\n "b": 2}', r"row 1 .*no field 'text'.*a: list, b: int"),
        ("x.json", b'{"data": [{"text": "a"}]}', r"no field 'text'.*data: list"),
        ("part-0", b'{"text": "a"}\n{"text": "b"}\n', r"call the file part-0\.jsonl"),
        ("x.json", b"[1,\n 2", "x.json is not valid JSON .*line 2"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents([str(tmp_path / name)])


def test_a_folder_leaves_out_what_it_cannot_read(tmp_path, caplog):
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\x00")
    with caplog.at_level(logging.WARNING):
        assert [d.text for d in read_documents([str(tmp_path)])] == ["text"]
    assert "picture.png" in caplog.text


def test_jsonl_as_others_write_it(tmp_path):
    line = '{"text": "one\u2028two\x85three"}'
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line.encode() + b'\r\n{"text": null}\r\n{"text": "b"}')
    assert [d.text for d in read_documents([str(path)])] == ["one\u2028two\x85three", "b"]
    path.write_text('{"text": "caf\\ud83d, \\ud83d\\ude00"}')  # half an emoji, and a whole one
    (document,) = read_documents([str(path)])
    assert document.text == "caf\ufffd, \U0001f600"


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "one"},\n {"text": "two"}]',
        '{"text": "one"}\n{"text": "two"}\n',
        json.dumps([{"text": "one"}, {"text": "two"}], indent=1),
    ],
)
def test_json_as_others_write_it(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    assert [d.text for d in read_documents([str(path)])] == ["one", "two"]
    path.write_text(json.dumps({"text": "one", "more": 1}, indent=1))
    assert [d.text for d in read_documents([str(path)])] == ["one"]


def test_missing_data_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"data='.*nowhere\.txt': no such"):
        read_documents([str(tmp_path / "nowhere.txt")])
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where the extra is not installed
    with pytest.raises(ValueError, match=r"longrope\[datasets\]"):
        read_documents(["owner/name-1.0"])


def test_the_library_is_there_and_split():
    held_out, rest = (
        read_documents([name]) for name in ("python-library-held-out", "python-library")
    )
    assert {d.name for d in held_out} == set(HELD_OUT)
    assert not {d.name for d in held_out} & {d.name for d in rest}
    assert any(d.name == "pydoc_topics" for d in rest)
    assert sum(len(d.text) for d in rest) > 3_000_000


def test_csv_is_read_by_rows(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('id,text\n1,"a, ""b""\nc"\n2,second\n3,\n')
    assert [d.text for d in read_documents([str(file)])] == ['a, "b"\nc', "second"]
    with pytest.raises(ValueError, match=r"no field 'body'.*id, text"):
        read_documents([str(file)], field="body")


ROWS = st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1), min_size=1)


def as_csv(texts, delimiter=","):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([["id", "body"], *([n, text] for n, text in enumerate(texts))])
    return file.getvalue().split("\r\n")[:-1]


def as_jsonl(texts):
    return [json.dumps({"id": n, "body": text}) for n, text in enumerate(texts)]


# Suffix → the lines of a file that holds texts, and lines that damage it.
KINDS = {
    ".jsonl": (
        as_jsonl,
        ["{", '{"body": 1}', '{"body": ["a"]}', '{"id": 1}', "[]", "\0", "1" * 5000],
    ),
    ".csv": (as_csv, ["1", "1,a,b", '1,"a"b', '1,"a', "1,\0"]),
    ".tsv": (lambda texts: as_csv(texts, "\t"), ["1", "1\ta\tb", '1\t"a"b', '1\t"a']),
    ".txt": (lambda texts: ["", *texts], ["\0", "a\0b"]),
}


@pytest.mark.parametrize("suffix", KINDS)
@given(st.data())
def test_a_file_is_read_as_a_whole_or_not_at_all(suffix, tmp_path_factory, data):
    """Any texts come back as they were; one damaged row refuses the file, and names it."""
    write, damages = KINDS[suffix]
    texts = data.draw(ROWS)
    lines = write(texts)
    folder = tmp_path_factory.mktemp("folder")
    whole, damaged = folder / f"a{suffix}", folder / f"b{suffix.upper()}"
    whole.write_text("\n".join(lines) + "\n", newline="")
    expected = list(dict.fromkeys(text for text in texts if text.strip()))
    if suffix == ".txt":
        expected = [text for text in ["\n".join(lines) + "\n"] if text.strip()]
    if expected:
        assert [d.text for d in read_documents([str(whole)], "body")] == expected
    place = data.draw(st.integers(1, len(lines)))
    damage = data.draw(st.sampled_from(damages))
    damaged.write_text("\n".join([*lines[:place], damage, *lines[place:]]) + "\n", newline="")
    with pytest.raises(ValueError, match=re.escape(str(damaged))):
        read_documents([str(damaged)], "body")
    if expected:
        assert [d.text for d in read_documents([str(folder)], "body")] == expected


def test_a_folder_uses_no_row_of_a_damaged_file(tmp_path, caplog):
    (tmp_path / "good.jsonl").write_text('{"text": "good"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n{"text": 3}\n')
    (tmp_path / "none.jsonl").write_text("\n")
    assert [d.text for d in read_documents([str(tmp_path)])] == ["good"]
    named = [record.getMessage() for record in caplog.records]
    assert [line.startswith("skipped the whole file: ") for line in named] == [True, True]
    assert "bad.jsonl: row 3 has int" in named[0]
    assert "none.jsonl contains no text" in named[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo\0", "a.txt: line 2 has a NUL character"),
        ("a.txt", b"one\xff", "a.txt is not UTF-8 text .byte 3 is 0xff"),
        ("a.jsonl", b'{"text": ["a"]}', "row 1 has list in the field 'text'"),
        ("a.jsonl", b'{"text": 1.5}', "row 1 has float in the field 'text'"),
        ("a.jsonl", b'{"a": "x", "b": 1}', r"no field 'text'.*it has: a\)"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user"}]}',
            "chat in the field 'messages'; .*apply_chat",
        ),
        ("a.json", b'{"text": [{"from": "human"}]}', "chat in the field 'text'; .*apply_chat"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "a.jsonl: line 1 is not valid JSON .*digits"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl: line 1 is not valid JSON .nested too deeply"),
        ("a.csv", b'text\n"a', "a.csv: line 2 is not valid CSV"),
        ("a.csv", b"id,text\n1,a\n\n2", "ends in line 4 has 1 fields, but the first line names 2"),
        ("a.csv", b"text,text\n1,a", "the field 'text' twice"),
        ("a.tsv", b"text,id\na,1", "no field 'text'.*it has: text,id"),
        ("a.json", b'[{"text": "a"},\n{"text": "b",}]', "a.json is not valid JSON .*line 2"),
        ("a.json", b'{"text": "a"}\n{"text": "b",}', "a.json: line 2 is not valid JSON"),
    ],
)
def test_messages_name_the_real_problem(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents([str(tmp_path / name)])


@pytest.mark.parametrize(
    ("kind", "compress"), [("gzip", gzip.compress), ("xz", lzma.compress), ("bzip2", bz2.compress)]
)
def test_a_compressed_file_is_named(tmp_path, kind, compress):
    file = tmp_path / "a.jsonl.z"
    file.write_bytes(compress(b'{"text": "a"}\n' * 100))
    with pytest.raises(ValueError, match=rf"a\.jsonl\.z is compressed \({kind}\)"):
        read_documents([str(file)])


def test_a_dataset_that_was_saved_to_disk(tmp_path):
    from datasets import Dataset, DatasetDict

    one, other = (Dataset.from_dict({"text": [f"{name} 1", f"{name} 2"]}) for name in "ab")
    one.save_to_disk(tmp_path / "one")
    splits = {"train": {"test": other, "train": one}, "only": {"test": one}}
    for name, found in splits.items():
        DatasetDict(found).save_to_disk(tmp_path / name)
        assert [d.text for d in documents_of(DatasetDict(found))] == ["a 1", "a 2"]
    for name in ("one", *splits):
        assert [d.text for d in read_documents([str(tmp_path / name)])] == ["a 1", "a 2"]
    unclear = DatasetDict({"x": one, "y": other})
    unclear.save_to_disk(tmp_path / "unclear")
    for read in (documents_of, lambda found: read_documents([str(tmp_path / "unclear")])):
        with pytest.raises(ValueError, match="the splits x, y, and no train"):
            read(unclear)
    assert len(read_documents([str(tmp_path / "unclear/y")])) == 2
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"cut")
    with pytest.raises(ValueError, match="one is not a whole dataset"):
        read_documents([str(tmp_path / "one")])


def test_parquet_of_another_type_or_cut_short(tmp_path):
    import pyarrow
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    for value, kind in ((b"a", "bytes"), (["a"], "list"), (1, "int")):
        parquet.write_table(pyarrow.table({"text": [value]}), file)
        with pytest.raises(ValueError, match=f"row 1 has {kind} in the field 'text'"):
            read_documents([str(file)])
    table = pyarrow.table({"text": [f"text {n}" * 50 for n in range(900)]})
    parquet.write_table(table, file, row_group_size=100, compression="zstd")
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :][:200] = bytes(200)
    content[len(content) // 3 : len(content) // 3 + 300] = bytes(300)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        read_documents([str(file)])


def test_long_fields_and_strings(tmp_path):
    """A CSV field over 131,072 characters, and strings that are too long for a file's name."""
    long = "word " * 60_000
    (tmp_path / "a.csv").write_text(f"id,text\n1,{long}\n")
    assert [d.text for d in read_documents([str(tmp_path / "a.csv")])] == [long]
    texts = ["word " * 100, "a\0b", "half \ud83d", "é" * 255]
    found = [d.text for d in documents_of(texts)]
    assert found == [*texts[:2], "half \ufffd", texts[3]]
    assert documents_of(texts[2:3])[0].sha256


@pytest.mark.parametrize("source", ["", " "])
def test_an_empty_source_is_not_the_current_directory(source, tmp_path, monkeypatch):
    (tmp_path / "private.txt").write_text("private")
    monkeypatch.chdir(tmp_path)
    for read in (lambda: read_documents([source]), lambda: check_sources([source])):
        with pytest.raises(ValueError, match=f"data is '{source}'; give a file"):
            read()


def test_a_text_counts_once_however_it_is_given(tmp_path):
    datasets = pytest.importorskip("datasets")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("the same")
    dataset = datasets.Dataset.from_dict({"text": ["the same"] * 4 + ["another"]})
    assert len(documents_of(str(tmp_path))) == 1
    assert len(documents_of(["the same"] * 3)) == 1
    assert [document.text for document in documents_of(dataset)] == ["the same", "another"]


def test_a_cloned_dataset_is_its_rows(tmp_path):
    (tmp_path / "README.md").write_text("about the dataset")
    assert [d.text for d in read_documents([str(tmp_path)])] == ["about the dataset"]
    (tmp_path / "train.jsonl").write_text('{"text": "a row"}')
    assert [d.text for d in read_documents([str(tmp_path)])] == ["a row"]
    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / "README.md").write_text("no rows are beside this")
    texts = [document.text for document in read_documents([str(tmp_path)])]
    assert texts == ["no rows are beside this", "a row"]


@pytest.mark.parametrize(
    "written",
    [
        ["model.sha256"],
        ["longrope.json"],
        ["history.jsonl", "state.json"],
        ["choices.json", "recipe.yaml"],
    ],
)
def test_results_in_the_data_directory_are_no_data(written, tmp_path):
    """A run whose --out is inside --data resumes, and does not read its own report."""
    (tmp_path / "book.txt").write_text("a book")
    (tmp_path / "history.jsonl").write_text('{"text": "a history"}')
    results = tmp_path / "runs" / "first"
    results.mkdir(parents=True)
    (results / "report.md").write_text("perplexity")
    for name in written:
        (results / name).write_text('{"text": "no text"}')
    (tmp_path / "long.gguf").write_bytes(b"GGUF\xff\0")
    (tmp_path / "long.md").write_text("a card")
    assert [d.text for d in read_documents([str(tmp_path)])] == ["a book", "a history"]
