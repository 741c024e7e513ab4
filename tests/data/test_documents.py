import json
import logging
import sys

import pytest

from longrope.data.documents import read_documents
from longrope.data.stdlib import HELD_OUT


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
        ("binary.txt", b"\x00\x01\xff", "binary.txt .*UTF-8"),
        ("latin.txt", "é".encode("latin-1"), "latin.txt .*UTF-8"),
        ("x.jsonl", b'{"text": 1}\n', "x.jsonl: row 1 .*int .*'text'.*`field`"),
        ("x.jsonl", b"[1]\n", "x.jsonl: row 1 .*object"),
        ("x.jsonl", b"{\n", "x.jsonl: line 1 .*JSON"),
        ("x.jsonl", b'{"other": "a"}\n', r"no field 'text'.*`field` .*: other"),
        ("x.parquet", b"PAR1", "x.parquet .*Parquet"),
        ("blank.jsonl", b'{"text": " "}\n', r"data='.*blank.jsonl' .*no text"),
        ("x.json", b'{"a": [1],\n "b": 2}', r"row 1 .*no field 'text'.*: a, b"),
        ("x.json", b"[1,\n 2", "x.json: line 1 .*JSON"),
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
