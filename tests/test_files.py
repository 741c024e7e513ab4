import os

import pytest

from longrope.files import append_line, read_lines, write_atomically


def test_writes_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.json"
    write_atomically(path, "before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\)"):
        write_atomically(path, "after")
    assert path.read_text() == "before"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_a_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "history.jsonl"
    append_line(path, {"a": 1})
    append_line(path, {"a": 0.1 + 0.2})
    with path.open("a") as file:
        file.write('{"a": 3')
    assert read_lines(path) == [{"a": 1}, {"a": 0.30000000000000004}]
    assert read_lines(tmp_path / "none") == []
