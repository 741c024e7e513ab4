"""Weight files: which belong to a model, that they are there, and none from elsewhere."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import FAMILIES, FOR_PICTURES
from longrope.checkpoints.export import ExportOptions, export
from longrope.execution import ExecutionConfig
from longrope.models.load import load_model
from longrope.models.weights import check_weights, has_own_head, weight_files

YARN = {"long_factors": "yarn", "target": "512"}


@pytest.fixture
def model(checkpoints, tmp_path):
    """A copy of a checkpoint, and beside it a folder with a secret and other weights."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("-----BEGIN PRIVATE KEY-----")
    save_file({"x": torch.zeros(1)}, outside / "theirs.safetensors")
    return shutil.copytree(checkpoints("llama"), tmp_path / "model")


@pytest.fixture
def sharded(model, micro_models):
    """The same in three shards with their index."""
    (model / "model.safetensors").unlink()
    micro_models("llama").save_pretrained(model, max_shard_size="400KB")
    assert len(weight_files(model)) >= 3
    return model


def indexed(model, weight_map):
    (model / "model.safetensors").unlink()
    file = model / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "name",
    [
        "../outside/secret",
        "../outside/theirs.safetensors",
        "{outside}/secret",
        "{outside}/theirs.safetensors",
        "shards/../../outside/theirs.safetensors",
        "link.safetensors",
        "folder/theirs.safetensors",
        "a\0.safetensors",
    ],
)
def test_an_index_that_leads_outside_is_refused(name, model, tmp_path):
    outside = tmp_path / "outside"
    (model / "link.safetensors").symlink_to(outside / "theirs.safetensors")
    (model / "folder").symlink_to(outside)
    indexed(model, {"x": name.format(outside=outside)})
    for form in ("hf", "gguf"):
        out = tmp_path / f"out.{form}"
        with pytest.raises(ValueError, match="leads outside the model's directory"):
            export(ExportOptions(str(model), out, form, **YARN))
        assert not out.exists()
    with pytest.raises(ValueError, match="leads outside the model's directory"):
        load_model(str(model))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "LICENSE"])
def test_a_link_that_leads_outside_is_refused(name, model, tmp_path):
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(tmp_path / "outside" / "secret")
    with pytest.raises(ValueError, match=f"{name}' leads outside"):
        export(ExportOptions(str(model), tmp_path / "out", **YARN))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "outside"}


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({}, "names no weight files"),
        ([], "names no weight files"),
        ({"x": ["a"]}, "only safetensors"),
        ({"x": "evil.bin"}, "only safetensors"),
        ({"x": "secret"}, "only safetensors"),
        ({"x": "none.safetensors"}, r"none\.safetensors: is missing"),
    ],
)
def test_an_index_without_safetensors_is_refused(weight_map, said, model, tmp_path):
    torch.save({}, model / "evil.bin")
    indexed(model, weight_map)
    for refused in (
        lambda: export(ExportOptions(str(model), tmp_path / "out", **YARN)),
        lambda: load_model(str(model)),
    ):
        with pytest.raises(ValueError, match=said):
            refused()
    assert not (tmp_path / "out").exists()


def test_a_link_to_a_file_that_the_hubs_cache_lost_is_named(model, tmp_path):
    snapshot = tmp_path / "models--a--b/snapshots/1"
    shutil.copytree(model, snapshot)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    with pytest.raises(ValueError, match=r"is a link to \.\./\.\./blobs/abc, which is missing"):
        weight_files(snapshot)


def test_a_missing_index_is_named(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"parts of the weights, but no model\.safetensors\.index"):
        weight_files(sharded)


def test_shards_in_folders_of_the_model_are_read_and_kept(sharded, micro_models, tmp_path):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = {k: f"shards/{name}" for k, name in index["weight_map"].items()}
    file.write_text(json.dumps(index))
    (sharded / "shards").mkdir()
    for shard in sharded.glob("*.safetensors"):
        shard.rename(sharded / "shards" / shard.name)
    export(ExportOptions(str(sharded), tmp_path / "out", **YARN))
    loaded = load_model(str(tmp_path / "out"), rope_scaling="replace", original_length=64)
    for name, tensor in micro_models("llama").state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)


def test_the_links_of_the_hubs_cache_are_read_through(model, tmp_path):
    """A snapshot's files are links to blobs, and the export has files of its own."""
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "1234"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    export(ExportOptions(str(snapshot), tmp_path / "out", **YARN))
    for name in ("model.safetensors", "tokenizer.json"):
        ours, theirs = tmp_path / "out" / name, snapshot / name
        assert not ours.is_symlink() and ours.read_bytes() == theirs.read_bytes()
        assert not ours.samefile(theirs)
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to("../../../../outside/secret")
    with pytest.raises(ValueError, match=r"tokenizer\.json' leads outside"):
        export(ExportOptions(str(snapshot), tmp_path / "again", **YARN))


@pytest.mark.parametrize("form", ["hf", "gguf"])
@pytest.mark.parametrize(
    "lost", ["lm_head.weight", "model.layers.2.mlp.up_proj.weight", "everything", "the end"]
)
def test_missing_weights_are_refused(lost, form, model, tmp_path):
    file = model / "model.safetensors"
    tensors = load_file(file)
    if lost == "the end":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        kept = {k: v for k, v in tensors.items() if k != lost and lost != "everything"}
        save_file(kept, file, metadata={"format": "pt"})
    said = {
        "everything": f"{len(tensors)} of the model's tensors are missing",
        "lm_head.weight": r"it has no output head \(lm_head\.weight\)",
        "the end": r"model\.safetensors: is not a whole safetensors file",
    }.get(lost, f"1 of the model's tensors are missing, such as {lost}")
    out = tmp_path / f"out.{form}"
    with pytest.raises(ValueError, match=said):
        export(ExportOptions(str(model), out, form, **YARN))
    assert not out.exists()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_names_of_a_compiled_or_wrapped_model_are_said(prefix, model, tmp_path):
    file = model / "model.safetensors"
    tensors = {f"{prefix}{name}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    for refused in (
        lambda: export(ExportOptions(str(model), tmp_path / "out", **YARN)),
        lambda: load_model(str(model)),
    ):
        with pytest.raises(ValueError, match=rf"named {prefix}….*take '{prefix}' off"):
            refused()


@pytest.mark.parametrize("family", [*FAMILIES, *FOR_PICTURES])
def test_whole_weights_of_every_family_pass(family, checkpoints, micro_models):
    """Names in a checkpoint are not always those of the model, as for experts."""
    check_weights(checkpoints(family), micro_models(family).config, False)


def test_the_weights_decide_whether_the_head_is_tied(model, ids, micro_models):
    """As in transformers 5; its version 4 and other engines believe the config."""
    config = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": True}
    (model / "config.json").write_text(json.dumps(config))
    assert has_own_head(model)
    loaded = load_model(str(model), ExecutionConfig(dtype="float32"))
    assert loaded.model.config.tie_word_embeddings is False
    with torch.no_grad():
        expected = micro_models("llama")(input_ids=ids).logits
        torch.testing.assert_close(loaded.model(input_ids=ids).logits, expected)
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    assert not has_own_head(model)
    assert load_model(str(model)).model.config.tie_word_embeddings is True
    del tensors["lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert not has_own_head(model)
    assert load_model(str(model)).model.config.tie_word_embeddings is True
