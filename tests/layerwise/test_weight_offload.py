"""Weight offloading: identical results, with at most two layers on the device."""

from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close

from conftest import FAMILIES, micro_model
from layerwise.test_forward import plain_losses, yarn
from longrope.execution import ExecutionConfig
from longrope.layerwise.backward import gradient
from longrope.layerwise.forward import LongForward
from longrope.layerwise.weight_offload import offload
from longrope.models.bundled import BUNDLED
from longrope.models.info import inspect_model
from longrope.models.load import load_model
from longrope.pipeline.plan import make_plan
from longrope.pipeline.recipe import make_recipe
from longrope.rope.apply import rescaled
from program import interpreter, succeeds

CPU = torch.device("cpu")


def on_the_host(model):
    """Offload a model so that weights that are not on the device are NaN."""
    stream = offload(model, CPU)
    put = stream._put

    def absent(index, tensors):
        if index is not None and tensors is None:
            tensors = [torch.full_like(t, float("nan")) for t in stream.host[index].values()]
        put(index, tensors)

    stream._put = absent
    for index in range(len(stream.host)):
        absent(index, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_identical(ids, family):
    resident, model = micro_model(FAMILIES[family]()), micro_model(FAMILIES[family]())
    on_the_host(model)
    for chunk in (20, 500):
        with rescaled(resident, yarn(resident)), rescaled(model, yarn(model)):
            expected = LongForward(resident, chunk).losses(ids)
            found = LongForward(model, chunk, offloaded=True).losses(ids)
        assert_close(found, expected, rtol=0, atol=0)
        with (
            rescaled(resident, yarn(resident), always=True),
            rescaled(model, yarn(model), always=True),
        ):
            expected = gradient(LongForward(resident, 20), ids[:1])
            found = gradient(LongForward(model, 20, offloaded=True), ids[:1])
            whole = gradient(LongForward(model, 500, offloaded=True), ids[:1])
        assert found.loss == expected.loss
        assert_close(found.grad, expected.grad, rtol=0, atol=0)
        assert_close(whole.grad, expected.grad, rtol=1e-3, atol=1e-6)


def test_at_most_two_layers_are_on_the_device(ids, monkeypatch):
    """A model of eight layers under a limit of two and a half layers' bytes."""
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 8
    model = micro_model(config)
    plain = plain_losses(model, ids)
    stream = offload(model, CPU)
    limit, most, came = 2.5 * stream.largest, 0, []
    fetch = stream._fetch

    def counted(*asked):
        nonlocal most
        arrived = fetch(*asked)
        came.extend((StorageWeakRef(t.untyped_storage()), t.nbytes) for t in arrived)
        most = max(most, sum(size for storage, size in came if not storage.expired()))
        return arrived

    monkeypatch.setattr(stream, "_fetch", counted)
    forward = LongForward(model, 20, offloaded=True)
    for _ in range(2):
        assert_close(forward.losses(ids), plain, rtol=1e-4, atol=1e-4)
    with rescaled(model, yarn(model), always=True):
        gradient(forward, ids[:1])
    assert sum(t.nbytes for tensors in stream.host for t in tensors.values()) > 3 * limit
    assert 1.5 * stream.largest < most <= limit  # the next layer was copied during computation


def test_a_checkpoint_on_disk(checkpoints, ids):
    source, small = str(checkpoints("llama")), ExecutionConfig(chunk_size=20)
    resident = load_model(source, small)
    loaded = load_model(source, small.model_copy(update={"offload_weights": True}))
    assert loaded.fingerprint() == resident.fingerprint()
    assert_close(loaded.forward().losses(ids), resident.forward().losses(ids), rtol=0, atol=0)
    assert loaded.fingerprint() == resident.fingerprint()


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(),
    reason="reads memory use from /proc, which only Linux has",
)
@pytest.mark.slow
def test_host_memory_does_not_hold_the_weights(tmp_path):
    """A forward pass of a 240 MB checkpoint uses less than half of that memory."""
    config = FAMILIES["llama"]()
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 12, 512, 6400
    model = micro_model(config)
    size = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path)
    for file in BUNDLED.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    program = (
        "import sys, threading, torch\n"
        "from longrope.execution import ExecutionConfig\n"
        "from longrope.models.load import load_model\n"
        "def held():\n"
        "    status = open('/proc/self/status').read()\n"
        "    return int(status.split('RssAnon:')[1].split()[0]) * 1024\n"
        "load_model('bundled')\n"  # import everything that loading needs
        "before, most = held(), []\n"
        "loaded = load_model(sys.argv[1], ExecutionConfig(offload_weights=True, chunk_size=64))\n"
        "for layer in loaded.model.model.layers:\n"
        "    layer.register_forward_hook(lambda *_: most.append(held()))\n"
        "loaded.forward().losses(torch.arange(3, 300)[None])\n"
        "print(max(most) - before)\n"
    )
    done = interpreter("-c", program, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < size / 2


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["gradient", "evolution"])
def test_a_search_finds_the_same(texts, tmp_path, algorithm):
    search = ["search", "bundled", "--target", "2x", "--data", texts, "--windows", 2]
    search += ["--budget", 4, "--algorithm", algorithm, "--chunk-size", 200, "--dtype", "float32"]
    succeeds(*search, "--out", tmp_path / "resident")
    succeeds(*search, "--out", tmp_path / "host", "--offload-weights")
    for name in ("history.jsonl", "rescale.json"):
        found, expected = ((tmp_path / side / name).read_text() for side in ("host", "resident"))
        assert found == expected


def test_the_plan_counts_what_is_on_the_device():
    info = inspect_model("bundled")

    def recipe(**execution):
        # several chunks: no graph is kept either way
        return make_recipe({"target": "8x", "execution": {"chunk_size": 512} | execution})

    whole = make_plan(info, recipe())["search"].memory
    less = make_plan(info, recipe(offload_weights=True))["search"].memory
    layers = info.parameters - info.vocabulary * info.hidden_size * (1 if info.tied else 2)
    assert whole - less == pytest.approx(4 * layers * (info.layers - 2) / info.layers, rel=0.01)
    # converted weights are held in memory in any case
    moved = recipe(dtype="bfloat16", offload_weights=True)
    whole = make_plan(info, recipe(dtype="bfloat16"), on_cpu=True)["search"].memory
    assert make_plan(info, moved, on_cpu=True)["search"].memory == whole
    assert make_plan(info, moved)["search"].memory < whole
