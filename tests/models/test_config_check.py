"""Configs and GGUF headers with wrong values: refused before work, in one line that names them."""

import json
import shutil
import struct
import time

import gguf
import numpy as np
import pytest

from conftest import ORIGINAL, pair
from gguf_model import write_gguf
from longrope.checkpoints.export import ExportOptions, export
from longrope.checkpoints.gguf import LONG, read_pair
from longrope.checkpoints.gguf_io import Tensor, read_metadata, read_tensors, write_file
from longrope.models.bundled import BUNDLED
from longrope.models.gguf_file import open_gguf, value_of
from longrope.models.info import inspect_model
from longrope.models.load import load_tokenizer

_LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def refused(config: dict, directory) -> str:
    (directory / "config.json").write_text(json.dumps(_LLAMA | config))
    with pytest.raises(ValueError, match=str(directory)) as caught:
        inspect_model(str(directory))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"rope_theta": None}, "rope_theta is null"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'"),
        ({"rope_scaling": {"type": None, "factor": 2.0}}, "rope_type is None"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type is 'su'"),
        ({"rope_scaling": {"type": "mrope", "factor": 2.0}}, "rope_type is 'mrope'"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling.factor is '4'"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "factor is null"),
        ({"rope_scaling": {"type": "yarn", "factor": float("nan")}}, "rope_scaling.factor is nan"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "an integer of 401 digits"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        (
            {"rope_parameters": {"rope_type": "longrope", "long_factor": [0], "short_factor": [1]}},
            r"rope_parameters.long_factor\[0\] is 0",
        ),
    ],
)
def test_a_rope_field_that_cannot_be_computed_with_is_named(config, said, tmp_path):
    assert said.replace("\\", "") in refused(config, tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("head_dim", 10**9),
        ("num_attention_heads", 10**9),
        ("hidden_size", 10**12),
        ("num_hidden_layers", 0),
        ("max_position_embeddings", -1),
    ],
)
def test_absurd_sizes_are_refused_before_work(field, value, tmp_path):
    began = time.monotonic()
    for config in ({field: value}, {"text_config": {field: value}}):
        assert f"{field} is {value}" in refused(config, tmp_path)
    assert time.monotonic() - began < 2


def test_deep_nesting_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match=r"config\.json: is not valid JSON \(nested too deeply\)"):
        inspect_model(str(tmp_path))


@pytest.mark.parametrize("length", [0, -5, 10**13])
def test_an_original_length_is_a_length(length):
    with pytest.raises(ValueError, match=f"original_length is {length}"):
        inspect_model("bundled", original_length=length)


def test_a_factor_without_a_type_is_not_taken_for_none(tmp_path):
    """transformers ignores it; other engines scale by it."""
    (tmp_path / "config.json").write_text(json.dumps(_LLAMA | {"rope_scaling": {"factor": 4.0}}))
    info = inspect_model(str(tmp_path))
    assert not info.extendable
    assert "factor 4.0 without a rope_type" in info.reason
    assert inspect_model(str(tmp_path), rope_scaling="replace").extendable
    both = {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 4.0}}
    (tmp_path / "config.json").write_text(json.dumps(_LLAMA | both))
    assert not inspect_model(str(tmp_path)).extendable


def test_scaling_beside_a_text_config_is_not_exported(micro_models):
    from longrope.checkpoints.hf import scaled_config

    model = micro_models("llama")
    nested = {"text_config": model.config.to_dict(), "rope_scaling": {"type": "linear"}}
    found = scaled_config(nested, pair(model), model.config)
    assert "rope_scaling" not in found
    assert found["text_config"]["rope_scaling"]["type"] == "longrope"


def rewritten(source, path, change):
    """A GGUF file with other key-value pairs."""
    reader = gguf.GGUFReader(source)
    arch, metadata = read_metadata(reader)
    write_file(path, arch, change(metadata), read_tensors(reader))
    return path


_FLOAT = gguf.GGUFValueType.FLOAT32
_STRING = gguf.GGUFValueType.STRING
# As llama.cpp reads them: a factor without a type is linear scaling.
SPELLINGS = {
    "the old key": [("llama.rope.scale_linear", 4.0, _FLOAT, None)],
    "no type": [("llama.rope.scaling.factor", 4.0, _FLOAT, None)],
    "linear": [
        ("llama.rope.scaling.type", "linear", _STRING, None),
        ("llama.rope.scaling.factor", 4.0, _FLOAT, None),
    ],
    "an attention factor": [("llama.rope.scaling.attn_factor", 1.2, _FLOAT, None)],
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, micro_models):
    path = tmp_path_factory.mktemp("gguf") / "plain.gguf"
    write_gguf(micro_models("llama"), path)
    return path


@pytest.mark.parametrize("name", SPELLINGS)
def test_gguf_scaling_is_recognised_however_it_is_spelt(name, plain, tmp_path):
    path = rewritten(plain, tmp_path / "scaled.gguf", lambda found: found + SPELLINGS[name])
    with pytest.raises(ValueError, match=r"scaled\.gguf: its RoPE is scaled already \(rope\.scal"):
        inspect_model(str(path))
    with pytest.raises(ValueError, match="without factor tensors"):
        read_pair(path)


@pytest.mark.parametrize(
    "none",
    [
        [("llama.rope.scaling.type", "none", _STRING, None), *SPELLINGS["no type"]],
        [("llama.rope.scale_linear", 1.0, _FLOAT, None)],
        [("llama.rope.scaling.factor", 0.0, _FLOAT, None)],
    ],
)
def test_gguf_scaling_that_llama_cpp_does_not_apply_is_none(none, plain, tmp_path):
    path = rewritten(plain, tmp_path / "plain.gguf", lambda found: found + none)
    assert inspect_model(str(path)).extendable
    assert read_pair(path) == (None, None)


@pytest.mark.parametrize("name", SPELLINGS)
def test_an_export_drops_the_scaling_of_its_source(name, plain, micro_models, tmp_path):
    path = rewritten(plain, tmp_path / "scaled.gguf", lambda found: found + SPELLINGS[name])
    factors = pair(micro_models("llama")).long
    factors.replace(original_max_position_embeddings=ORIGINAL).save(tmp_path / "long.json")
    out = tmp_path / "out.gguf"
    export(ExportOptions(str(path), out, "gguf", long_factors=str(tmp_path / "long.json")))
    known = value_of(open_gguf(out))
    kept = {key: value for key, value in known.items() if key.startswith("rope.scal")}
    assert set(kept) == {
        "rope.scaling.attn_factor",
        "rope.scaling.type",
        "rope.scaling.original_context_length",
    }
    assert kept["rope.scaling.attn_factor"] == pytest.approx(1.1)
    assert read_pair(out)[0].long.factors == pytest.approx(factors.factors)


@pytest.mark.parametrize("name", ["the old key", "no type"])
def test_linear_scaling_beside_factor_tensors_multiplies_them(name, plain, tmp_path):
    reader = gguf.GGUFReader(plain)
    arch, metadata = read_metadata(reader)
    values = np.full(8, 3.0, np.float32)
    kind = gguf.GGMLQuantizationType.F32
    tensors = [Tensor(LONG, (8,), values.dtype, values.nbytes, kind, lambda: values)]
    tensors += [dataclass_named(tensors[0], LONG.replace("long", "short"))]
    path = tmp_path / "both.gguf"
    write_file(path, arch, metadata + SPELLINGS[name], read_tensors(reader) + tensors)
    found, _ = read_pair(path)
    assert found.long.factors == (12.0,) * 8


def dataclass_named(tensor: Tensor, name: str) -> Tensor:
    return Tensor(name, tensor.shape, tensor.dtype, tensor.nbytes, tensor.kind, tensor.data)


def header(pairs: bytes, count: int = 1) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, count) + pairs + bytes(64)


def key(name: bytes, kind: int) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind)


@pytest.mark.parametrize(
    "content",
    [
        header(key(b"a", 9) + struct.pack("<IQ", 9, 2**40)),  # an array of arrays
        header(key(b"a", 9) + struct.pack("<IQ", 4, 2**40)),  # of numbers beyond the end
        header(key(b"a", 9) + struct.pack("<IQ", 8, 2**60)),  # of strings
        header(key(b"a", 8) + struct.pack("<Q", 2**63)),
        header(b"", count=2**62),
        header(key(b"a", 77)),
        b"GGUF",
        b"",
    ],
)
def test_a_gguf_header_is_not_believed_beyond_the_file(content, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(content)
    began = time.monotonic()
    for read in (inspect_model, open_gguf):
        with pytest.raises(ValueError, match=r"bad\.gguf: not a GGUF file"):
            read(str(tmp_path / "bad.gguf") if read is inspect_model else tmp_path / "bad.gguf")
    assert time.monotonic() - began < 2


def test_absurd_sizes_in_a_gguf_file_are_refused(plain, tmp_path):
    def many(found):
        kind = gguf.GGUFValueType.UINT32
        rest = [item for item in found if item[0] != "llama.block_count"]
        return [*rest, ("llama.block_count", 10**9, kind, None)]

    path = rewritten(plain, tmp_path / "many.gguf", many)
    with pytest.raises(ValueError, match=r"many\.gguf: num_hidden_layers is 1000000000"):
        inspect_model(str(path))


def test_a_tokenizer_model_names_sentencepiece(tmp_path, monkeypatch):
    monkeypatch.setattr("longrope.models.sources._is_installed", lambda package: False)
    shutil.copy(BUNDLED / "config.json", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"tokenizer\.model: .*pip install sentencepiece"):
        load_tokenizer(str(tmp_path))


def test_remote_code_names_the_option(tmp_path):
    config = {"model_type": "weird", "auto_map": {"AutoConfig": "conf.C"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="give trust_remote_code=True if you trust it"):
        inspect_model(str(tmp_path))
