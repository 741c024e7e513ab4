import os

from contents import contents, fill
from longrope.files.lock import only_process


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
