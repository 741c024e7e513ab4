import errno
import itertools
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from contents import contents, fill
from kills import killed_at
from longrope.files.atomic import (
    atomic_directory,
    copy_file,
    recover,
    require_directory,
    temporary_directory,
    write_atomically,
)
from longrope.files.stores import write_arrays


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


OLD = {"both": "old", "only-old": "old", "sub/file": "old"}


NEW = {"both": "new", "only-new": "new", "sub/file": "new", "other/file": "new"}


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


def killed_replacements(place, every=1):
    """Replace the old files by the new ones, each time killed at a later step; yield after each."""
    for step in itertools.count(0, every):
        shutil.rmtree(place.parent, ignore_errors=True)
        fill(place, OLD)
        if not killed_at(step, lambda: replace(place)):
            return
        yield


@pytest.mark.parametrize("mounted", [False, True])
def test_a_directory_survives_a_kill_at_any_step(tmp_path, monkeypatch, mounted):
    place, seen = tmp_path / "parent" / "out", []
    if mounted:
        cannot_be_renamed(place, errno.EXDEV, monkeypatch)
    for _ in killed_replacements(place):
        recover(place)
        seen.append(contents(place))
        assert seen[-1] in (OLD, NEW)
        assert os.listdir(place.parent) == ["out"]
    assert len(seen) > 10
    assert seen == sorted(seen, key=lambda found: found == NEW)  # once new, it stays so
    assert OLD in seen and NEW in seen
    assert contents(place) == NEW
    assert os.listdir(place.parent) == ["out"]


@pytest.mark.parametrize("mounted", [False, True])
def test_a_kill_in_recovery_loses_nothing(tmp_path, monkeypatch, mounted):
    place = tmp_path / "parent" / "out"
    if mounted:
        cannot_be_renamed(place, errno.EXDEV, monkeypatch)
    for _ in killed_replacements(place, every=3):
        again = 0
        while killed_at(again, lambda: recover(place)):
            again += 2
        assert contents(place) in (OLD, NEW)
        assert os.listdir(place.parent) == ["out"]


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


def test_the_next_write_deletes_what_a_kill_left(tmp_path):
    """Of the same file only: in a cache, others write beside it."""

    def write():
        write_atomically(tmp_path / "a.json", "whole")

    steps = 0
    while killed_at(steps, write):
        steps += 1
        other = tmp_path / ".b.json.longrope-tmp-1"
        other.write_text("of another process, which runs")
        write()
        assert contents(tmp_path) == {"a.json": "whole", other.name: other.read_text()}
    assert steps >= 2


def test_a_file_is_replaced_through_a_link(tmp_path):
    fill(tmp_path, {"disk/real.md": "old"})
    (tmp_path / "card.md").symlink_to("disk/real.md")
    write_atomically(tmp_path / "card.md", "new")
    assert (tmp_path / "card.md").is_symlink()
    assert contents(tmp_path / "disk") == {"real.md": "new"}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_the_umask_alone_decides_who_may_read(umask, tmp_path):
    """safetensors lets nobody but the owner read what it writes."""
    fill(tmp_path, {"source": "weights"})
    (tmp_path / "source").chmod(0o640)
    before = os.umask(umask)
    try:
        write_arrays(tmp_path / "cache", {"ids": np.zeros(3)})
        with atomic_directory(tmp_path / "out") as directory:
            save_file({"x": np.zeros(3)}, directory / "model.safetensors")
            fill(directory, {"parts/config.json": "{}"})
            os.link(tmp_path / "source", directory / "linked")
    finally:
        os.umask(before)
    for name in ("cache", "out/model.safetensors", "out/parts/config.json"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "source").stat().st_mode & 0o777 == 0o640


def test_a_copy_shares_nothing_with_the_file(tmp_path):
    fill(tmp_path, {"file": "old" * 10_000})
    (tmp_path / "link").symlink_to("file")
    copy_file(tmp_path / "link", tmp_path / "copy")
    assert not (tmp_path / "copy").is_symlink()
    assert (tmp_path / "copy").read_text() == "old" * 10_000
    with (tmp_path / "copy").open("r+") as file:
        file.write("new")
    assert (tmp_path / "file").read_text() == "old" * 10_000


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
