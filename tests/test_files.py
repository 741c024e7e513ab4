import errno
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import save
from typing_extensions import TypedDict

from kills import killed_at
from longrope.files import (
    append_line,
    atomic_directory,
    content_of,
    copy_file,
    only_process,
    read_arrays,
    read_json,
    read_lines,
    read_yaml,
    recover,
    require_directory,
    temporary_directory,
    write_arrays,
    write_atomically,
)

_HOSTILE = {
    "": "is not valid JSON",
    "[1, 2": "is not valid JSON",
    "[" * 100_000: "nested too deeply",
    '{"a": ' * 50_000: "nested too deeply",
    f'{{"n": {"9" * 400}}}': "an integer of 400 digits",
    f'{{"n": {"9" * 6000}}}': "an integer of 6000 digits",
    "[1]": r"its content is \[1\]: input should be a valid dict",
    '{"n": "x", "names": []}': "n is 'x'",
    '{"n": 1, "names": [1]}': "names.0 is 1",
    '{"n": 1}': "names is .*field required",
}


class _Content(TypedDict):
    n: int
    names: list[str]


@pytest.mark.parametrize("text", _HOSTILE, ids=range(len(_HOSTILE)))
def test_json_is_read_into_checked_values(text, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"^{file}: .*{_HOSTILE[text]}") as caught:
        read_json(file, _Content)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    with pytest.raises(ValueError, match=r"y\.json: No such file"):
        read_json(tmp_path / "y.json")
    file.write_text('{"n": 3, "names": ["a"]}')
    assert read_json(file, _Content) == {"n": 3, "names": ["a"]}
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"x\.json: is not JSON \(not UTF-8"):
        read_json(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "\n".join(
                f"a{n}: &x{n} [{', '.join(9 * [f'*x{n - 1}'])}]" if n else "a0: &x0 [1]"
                for n in range(9)
            ),
            "aliases stand for more than",
        ),
        ("[" * 50_000, "nested too deeply"),
        ("a: 1\na: 2", "'a' stands twice, again in line 2"),
        ("a: !!bool maybe", "maybe"),
        ("a: 2021-99-99", "month must be in"),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
        ("- 1", "is not a mapping"),
        ("1: 2", "is not a mapping"),
    ],
)
def test_yaml_is_read_into_a_mapping(text, said, tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"^{file} .*{said}") as caught:
        read_yaml(file)
    assert "\n" not in str(caught.value)


def test_content_of_other_types_names_the_file(tmp_path):
    for wrong in (lambda: {}["key"], lambda: None + 1, lambda: [][3], lambda: 1 / 0, lambda: "".x):
        with (
            pytest.raises(ValueError, match=f"^{tmp_path}: is damaged .*run it again"),
            content_of(tmp_path, "run it again"),
        ):
            wrong()


def test_a_remedy_is_one_that_works(tmp_path, monkeypatch):
    """A read-only directory has space."""
    for number, said in ((13, "you may write to"), (30, "you may write to"), (28, "free disk")):

        def fails(*_, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fails)
        with pytest.raises(ValueError, match=said):
            write_atomically(tmp_path / "x", "")
    with pytest.raises(ValueError, match="File name too long"):
        require_directory(tmp_path / ("x" * 5000))


def test_writes_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.json"
    write_atomically(path, "before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"file\.json .*\(No space left on device\)"):
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


OLD = {"both": "old", "only-old": "old", "sub/file": "old"}
NEW = {"both": "new", "only-new": "new", "sub/file": "new", "other/file": "new"}


def fill(directory, files):
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)


def contents(directory):
    return {
        str(file.relative_to(directory)): file.read_text()
        for file in directory.rglob("*")
        if file.is_file()
    }


def replace(path):
    with atomic_directory(path) as directory:
        fill(directory, NEW)


def cannot_be_renamed(path, code, monkeypatch):
    """What the kernel says of a mount point: it stays where it is, and nothing crosses it."""
    rename = os.rename

    def refuse(source, target):
        inside = [str(x).startswith(f"{path}/") for x in (source, target)]
        if str(path) in (str(source), str(target)) or inside[0] != inside[1]:
            raise OSError(code, os.strerror(code))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)


@pytest.mark.parametrize("mounted", [False, True])
def test_a_directory_survives_a_kill_at_any_step(tmp_path, monkeypatch, mounted):
    place, steps, seen = tmp_path / "parent" / "out", 0, []
    if mounted:
        cannot_be_renamed(place, errno.EXDEV, monkeypatch)
    while True:
        shutil.rmtree(place.parent, ignore_errors=True)
        fill(place, OLD)
        if not killed_at(steps, lambda: replace(place)):
            break
        recover(place)
        seen.append(contents(place))
        assert seen[-1] in (OLD, NEW)
        assert os.listdir(place.parent) == ["out"]
        steps += 1
    assert steps > 10
    assert seen == sorted(seen, key=lambda found: found == NEW)  # once new, it stays so
    assert OLD in seen and NEW in seen
    assert contents(place) == NEW
    assert os.listdir(place.parent) == ["out"]


@pytest.mark.parametrize("mounted", [False, True])
def test_a_kill_in_recovery_loses_nothing(tmp_path, monkeypatch, mounted):
    place, steps = tmp_path / "parent" / "out", 0
    if mounted:
        cannot_be_renamed(place, errno.EXDEV, monkeypatch)
    while True:
        shutil.rmtree(place.parent, ignore_errors=True)
        fill(place, OLD)
        if not killed_at(steps, lambda: replace(place)):
            break
        again = 0
        while killed_at(again, lambda: recover(place)):
            again += 2
        assert contents(place) in (OLD, NEW)
        assert os.listdir(place.parent) == ["out"]
        steps += 3


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV, errno.EACCES])
def test_a_directory_that_cannot_be_renamed_is_replaced(tmp_path, monkeypatch, code):
    place = tmp_path / "out"
    fill(place, OLD)
    same = place.stat().st_ino
    cannot_be_renamed(place, code, monkeypatch)
    replace(place)
    assert contents(place) == NEW
    assert place.stat().st_ino == same
    assert os.listdir(tmp_path) == ["out"]


def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path):
    fill(tmp_path / "disk" / "real", OLD)
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "disk" / "real")
    replace(link)
    assert link.is_symlink()
    assert contents(tmp_path / "disk" / "real") == NEW
    assert os.listdir(tmp_path / "disk") == ["real"]


def test_an_error_leaves_the_old_directory(tmp_path, monkeypatch):
    fill(tmp_path / "out", OLD)
    monkeypatch.setitem(NEW, "", "a directory has no such file")
    with pytest.raises(ValueError, match="out"):
        replace(tmp_path / "out")
    assert contents(tmp_path / "out") == OLD
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file"):
        replace(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_that_was_created_in_vain_is_removed(tmp_path):
    out = tmp_path / "new" / "run"
    with only_process(out):
        assert (out / ".lock").exists()
    assert not (tmp_path / "new").exists()
    with only_process(out):
        (out / "result").write_text("kept")
    assert {p.name for p in out.iterdir()} == {".lock", "result"}
    (tmp_path / "there").mkdir()
    with only_process(tmp_path / "there"):
        pass
    assert (tmp_path / "there").exists()


def test_what_killed_processes_left_is_deleted_and_nothing_else(tmp_path):
    """Weights of gigabytes, in a run and in the directories of its stages."""
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    dead = {
        f".recipe.yaml.longrope-tmp-{child}": "",
        f"finetune/.model.longrope-tmp-{child}/model.safetensors": "weights",
        f"evaluate/.cells.jsonl.longrope-tmp-{child}": "",
        # a number that another process has got since
        f".old.longrope-tmp-{os.getpid()}": "",
    }
    kept = {
        f".under-way.longrope-tmp-{os.getpid()}": "",
        f".recipe.yaml.{child}": "",
        ".model.longrope-tmp-x": "",
        f"finetune/model.longrope-tmp-{child}": "",
        f"finetune/model/deep/.theirs.longrope-tmp-{child}": "",
    }
    fill(tmp_path, dead | kept)
    os.utime(tmp_path / f".old.longrope-tmp-{os.getpid()}", (1, 1))
    with only_process(tmp_path):
        assert set(contents(tmp_path)) == {*kept, ".lock"}


def test_a_file_is_replaced_through_a_link(tmp_path):
    fill(tmp_path, {"disk/real.md": "old"})
    (tmp_path / "card.md").symlink_to("disk/real.md")
    write_atomically(tmp_path / "card.md", "new")
    assert (tmp_path / "card.md").is_symlink()
    assert contents(tmp_path / "disk") == {"real.md": "new"}


def test_a_copy_shares_nothing_with_the_file(tmp_path):
    fill(tmp_path, {"file": "old" * 10_000})
    (tmp_path / "link").symlink_to("file")
    copy_file(tmp_path / "link", tmp_path / "copy")
    assert not (tmp_path / "copy").is_symlink()
    assert (tmp_path / "copy").read_text() == "old" * 10_000
    with (tmp_path / "copy").open("r+") as file:
        file.write("new")
    assert (tmp_path / "file").read_text() == "old" * 10_000


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


def test_temporary_files_name_tmpdir(tmp_path, monkeypatch):
    def nowhere(*_, **__):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    with temporary_directory() as directory:
        (directory / "a").write_text("a")
    assert not directory.exists()
    with pytest.raises(ValueError, match=r"No space left.*TMPDIR"), temporary_directory():
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), temporary_directory():
        (tmp_path / "none").read_text()
    monkeypatch.setattr("tempfile.mkdtemp", nowhere)
    with pytest.raises(ValueError, match=r"No usable .*TMPDIR"), temporary_directory():
        raise AssertionError


def test_any_character_can_be_written(tmp_path):
    write_atomically(tmp_path / "a", "λ 😀 \udcff")
    assert (tmp_path / "a").read_bytes() == "λ 😀 ".encode() + rb"\udcff"
