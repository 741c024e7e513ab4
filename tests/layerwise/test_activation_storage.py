"""Activations offloaded to files: identical results in less memory."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from conftest import FAMILIES, micro_model
from layerwise.test_forward import yarn
from longrope.errors import RankLost
from longrope.layerwise.activation_storage import allocate, is_directory, warn_if_in_memory
from longrope.layerwise.backward import gradient
from longrope.layerwise.forward import LongForward
from longrope.models.devices import find_offload_target
from longrope.models.info import inspect_model
from longrope.pipeline.costs import Costs
from longrope.pipeline.estimate import Memory, available, check_memory
from longrope.pipeline.recipe import make_recipe
from longrope.rope.apply import rescaled
from program import interpreter, lines, start, succeeds


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_identical(ids, family, tmp_path):
    model = micro_model(FAMILIES[family]())
    with rescaled(model, yarn(model), always=True):
        for chunk, offloaded in ((20, False), (500, True), (500, False)):
            here = LongForward(model, chunk, offloaded=offloaded)
            there = LongForward(model, chunk, tmp_path, offloaded=offloaded)
            assert_close(there.losses(ids), here.losses(ids), rtol=0, atol=0)
            expected, found = gradient(here, ids[:1]), gradient(there, ids[:1])
            assert found.loss == expected.loss
            assert_close(found.grad, expected.grad, rtol=0, atol=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tensors_live_in_unnamed_files(tmp_path, dtype):
    tensor = allocate(tmp_path, (3, 5, 7), dtype)
    tensor.copy_(torch.arange(105).view(3, 5, 7))
    assert tensor.dtype == dtype
    assert tensor[:, 1:].sum() == torch.arange(105, dtype=dtype).view(3, 5, 7)[:, 1:].sum()
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path) in maps.read_text()
        del tensor
        assert str(tmp_path) not in maps.read_text()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"offload_activations .* 1,000,000\.0 GB .* larger disk"):
        allocate(tmp_path, (10**15,), torch.uint8)
    too_much = 2 * shutil.disk_usage(tmp_path).free
    with pytest.raises(ValueError, match=r"GB \((No space|File too).* larger disk"):
        allocate(tmp_path, (too_much,), torch.uint8)
    with pytest.raises(ValueError, match=r"\(No such file .* memory-mapped"):
        allocate(tmp_path / "gone", (10,), torch.uint8)
    assert not list(tmp_path.iterdir())


def test_a_lost_rank_is_not_reported_as_a_full_disk(tmp_path, monkeypatch):
    """As when the launcher terminates this process because another one failed."""

    def told(*_):
        raise RankLost("another process of this run died")

    monkeypatch.setattr(os, "posix_fallocate", told, raising=False)
    with pytest.raises(RankLost, match="another process"):
        allocate(tmp_path, (10,), torch.float32)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/shm").is_mount(), reason="/dev/shm is not mounted")
def test_a_directory_in_memory_is_warned_of(tmp_path, caplog):
    warn_if_in_memory.cache_clear()
    assert find_offload_target("/dev/shm") == Path("/dev/shm")
    assert "offload_activations /dev/shm" in caplog.text


@pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="reads open files from /proc, which only Linux has"
)
def test_no_file_stays_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    tensors = [allocate(tmp_path, (10,), torch.float32) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert sum(tensor.fill_(1).sum().item() for tensor in tensors) == 200


@pytest.mark.parametrize("unnamed", [True, False])
def test_a_file_has_no_name_where_the_system_can_do_without(tmp_path, monkeypatch, unnamed):
    """While it is mapped too: a kill there must leave nothing behind."""
    if unnamed and not hasattr(os, "O_TMPFILE"):
        pytest.skip("only Linux has unnamed files")
    if not unnamed:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    mapped, seen = torch.from_file, []

    def from_file(*args, **options):
        seen.append(len(list(tmp_path.iterdir())))
        return mapped(*args, **options)

    monkeypatch.setattr(torch, "from_file", from_file)
    tensor = allocate(tmp_path, (3, 4), torch.float32)
    assert tensor.fill_(2).sum().item() == 24
    assert seen == [0 if unnamed else 1]
    assert not list(tmp_path.iterdir())


def test_a_device_or_a_folder(tmp_path):
    assert [is_directory(name) for name in ("cpu", "cuda:3", "/scratch", "scratch")] == [
        False, False, True, True,
    ]  # fmt: skip
    assert find_offload_target("cpu") == torch.device("cpu")
    assert find_offload_target(str(tmp_path)) == tmp_path
    for wrong in (tmp_path / "gone", "moon"):
        with pytest.raises(ValueError, match=f"offload_activations is '{wrong}'"):
            find_offload_target(str(wrong))


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(),
    reason="reads memory use from /proc, which only Linux has",
)
@pytest.mark.slow
def test_memory_does_not_hold_offloaded_activations(tmp_path):
    """Sixteen layers on 1,000 tokens keep 90 MB, in memory or in a directory."""
    program = (
        "import sys, torch\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "from conftest import FAMILIES, micro_model\n"
        "from layerwise.test_forward import yarn\n"
        "from longrope.layerwise.forward import LongForward\n"
        "from longrope.layerwise.backward import gradient\n"
        "from longrope.rope.apply import rescaled\n"
        "from longrope.layerwise import split_attention, backward as module\n"
        "module._MAX_GRAPH_BYTES = 0\n"
        "split_attention._BYTES_PER_TOKEN = 0\n"
        "def held():\n"
        "    status = open('/proc/self/status').read()\n"
        "    return int(status.split('RssAnon:')[1].split()[0]) * 1024\n"
        "config = FAMILIES['llama']()\n"
        "config.num_hidden_layers, config.hidden_size, config.head_dim = 16, 1024, 64\n"
        "config.intermediate_size = 64\n"
        "model, seen = micro_model(config), []\n"
        "for layer in model.model.layers:\n"
        "    layer.register_forward_pre_hook(lambda *_: seen.append(held()))\n"
        "with rescaled(model, yarn(model), always=True):\n"
        "    gradient(LongForward(model, 256), torch.arange(3, 203)[None])\n"
        "    for where in (Path(sys.argv[1]), None):\n"
        "        before = held()\n"
        "        seen.clear()\n"
        "        gradient(LongForward(model, 256, where), torch.randint(3, 1500, (1, 1001)))\n"
        "        print(max(seen) - before)\n"
    )
    tests = Path(__file__).parents[1]
    done = interpreter("-c", program, tmp_path, tests, env={"MALLOC_TRIM_THRESHOLD_": "0"})
    assert done.returncode == 0, done.stderr
    in_folder, in_memory = map(int, done.stdout.split())
    assert in_memory > 80e6
    assert in_folder < in_memory - 70e6


def test_a_search_is_unchanged_and_leaves_no_file_when_killed(texts, tmp_path):
    search = ["search", "bundled", "--target", "2x", "--data", texts, "--windows", 2]
    search += ["--budget", 14, "--chunk-size", 200, "--dtype", "float32", "--transfer", "none"]
    folder = tmp_path / "scratch"
    folder.mkdir()
    succeeds(*search, "--out", tmp_path / "memory")
    on_disk = [*search, "--offload-activations", folder, "--out", tmp_path / "disk"]
    history = tmp_path / "disk" / "history.jsonl"
    killed = start(*on_disk).kill_when(lambda: lines(history) >= 5)
    assert killed.returncode == -signal.SIGKILL
    assert not list(folder.iterdir())
    succeeds(*on_disk)
    for name in ("history.jsonl", "rescale.json"):
        found, expected = ((tmp_path / side / name).read_text() for side in ("disk", "memory"))
        assert found == expected
    assert '"grad"' in history.read_text()


def test_the_plan_asks_the_disk(tmp_path):
    info = inspect_model("bundled")

    def search(on_cpu, **changes):
        recipe = make_recipe({"target": "8x", "execution": {"chunk_size": 512} | changes})
        return Costs(info, recipe, on_cpu).search("search", 2048)

    here, there = search(False), search(False, offload_activations=str(tmp_path))
    assert there.disk > here.memory - there.memory > 0  # some heads are copied to the device
    assert (there.host, here.disk) == (0, 0)
    on_cpu = search(True), search(True, offload_activations=str(tmp_path))
    assert on_cpu[1].disk == on_cpu[0].memory - on_cpu[1].memory > 0
    check_memory([there], Memory(10**9, host=0, disk=there.disk))
    with pytest.raises(
        ValueError,
        match=r"search at 2,048 .* files, .*search\.algorithm",
    ):
        check_memory([there], Memory(10**9, disk=there.disk - 1))
    with pytest.raises(
        ValueError, match=r"try --algorithm evolution, --offload-activations DIRECTORY, --off"
    ):
        check_memory([on_cpu[0]], Memory(10**6), options=True)
    host = search(False, offload_activations="cpu")
    with pytest.raises(
        ValueError, match=r"the host's .* try --offload-activations DIRECTORY, --algorithm"
    ):
        check_memory([host], Memory(10**9, host=10**6), options=True)
    cpu = torch.device("cpu")
    assert available(cpu).disk is available(cpu, 1, "cpu").disk is None
    assert available(cpu, 1, str(tmp_path / "on another machine")).disk is None
    assert 0 < available(cpu, 1, str(tmp_path)).disk < 10**16  # type: ignore[operator]
