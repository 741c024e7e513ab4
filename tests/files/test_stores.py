import numpy as np
from safetensors.numpy import save

from longrope.files.stores import append_line, read_arrays, read_lines, write_arrays


def test_a_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "history.jsonl"
    append_line(path, {"a": 1})
    append_line(path, {"a": 0.1 + 0.2})
    with path.open("a") as file:
        file.write('{"a": 3')
    assert read_lines(path) == [{"a": 1}, {"a": 0.30000000000000004}]
    assert read_lines(tmp_path / "none") == []


def test_arrays_come_back_or_are_none(tmp_path):
    path = tmp_path / "a.safetensors"
    arrays = {"ids": np.arange(6, dtype=np.int32), "of": np.ones((2, 0)), "x": np.eye(3)[:, 1]}
    write_arrays(path, arrays)
    found = read_arrays(path)
    assert found is not None
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        assert read_arrays(path) is None, place
    for content in (b"", whole[:-1], whole[:9], whole + b"0", save(arrays)):
        path.write_bytes(content)
        assert read_arrays(path) is None
    (tmp_path / "b.safetensors").write_bytes(whole)  # another's name
    assert read_arrays(tmp_path / "b.safetensors") is None
    assert read_arrays(tmp_path / "none") is None
