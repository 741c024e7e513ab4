"""GGUF files with factor tensors: round trips, refusals, and llama.cpp's own answers."""

import dataclasses
import json
import shutil
import struct

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from conftest import pair
from longrope.checkpoints.export import ExportOptions, export
from longrope.checkpoints.gguf import LONG, SHORT
from longrope.checkpoints.gguf_io import read_metadata, read_tensors, write_file
from longrope.checkpoints.importer import import_pair
from longrope.engines.check import Reference, verify
from longrope.execution import ExecutionConfig
from longrope.models.bundled import BUNDLED
from longrope.models.info import inspect_model
from longrope.models.load import load_model
from longrope.rope.pair import RescalePair
from longrope.rope.rescale import Rescale


@pytest.fixture
def made(tmp_path):
    """Factors for the bundled model: short up to 512 tokens, long to 16,384."""
    shared = {"rope_theta": 1e4, "original_max_position_embeddings": 256, "attention_factor": 1.3}
    short = Rescale(tuple(np.linspace(1, 1.5, 32)), max_position_embeddings=512, **shared)
    long = Rescale(tuple(np.geomspace(1, 60, 32)), max_position_embeddings=16384, **shared)
    short.save(tmp_path / "short.json")
    long.save(tmp_path / "long.json")
    return RescalePair(short, long)


def options(tmp_path, source, name, form):
    return ExportOptions(
        str(source),
        tmp_path / name,
        form,
        long_factors=str(tmp_path / "long.json"),
        short_factors=str(tmp_path / "short.json"),
    )


@pytest.mark.parametrize("form", ["gguf", "gguf-static"])
def test_llama_cpp_applies_the_factors(form, made, tmp_path):
    export(options(tmp_path, "bundled", "model.gguf", form))
    verdict = verify(Reference(str(tmp_path / "model.gguf")), "llamacpp", prompts=1)
    assert verdict.right, verdict
    sets = {line.applied for line in verdict.lines}
    assert sets == ({"short", "long"} if form == "gguf" else {"long"})
    assert max(line.largest for line in verdict.lines) < 0.2  # llama.cpp's float16 cache
    assert min(line.distances["none"] for line in verdict.lines) > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("key", ["rope.scale_linear", "rope.scaling.factor"])
def test_llama_cpp_applies_no_scaling_of_the_source(made, tmp_path, key):
    """A factor without a type is linear scaling to llama.cpp, beside other factors too."""
    import gguf

    export(options(tmp_path, "bundled", "clean.gguf", "gguf-static"))
    reader = gguf.GGUFReader(tmp_path / "clean.gguf")
    arch, metadata = read_metadata(reader)
    scaled = (f"llama.{key}", 4.0, gguf.GGUFValueType.FLOAT32, None)
    metadata = [item for item in metadata if ".rope.scaling." not in item[0]] + [scaled]
    tensors = [t for t in read_tensors(reader) if t.name != "rope_freqs.weight"]
    write_file(tmp_path / "source.gguf", arch, metadata, tensors)
    export(options(tmp_path, tmp_path / "source.gguf", "model.gguf", "gguf-static"))
    verdict = verify(Reference(str(tmp_path / "model.gguf")), "llamacpp", prompts=1)
    assert {line.applied for line in verdict.lines} == {"long"}, verdict
    assert max(line.largest for line in verdict.lines) < 0.2


def test_weights_are_the_checkpoints_own(made, tmp_path):
    """Read back by transformers, which does not know of the factors."""
    import torch

    export(options(tmp_path, "bundled", "model.gguf", "gguf"))
    found = load_model(
        str(tmp_path / "model.gguf"),
        ExecutionConfig(dtype="float32"),
        rope_scaling="replace",
        original_length=256,
    )
    own = load_model("bundled", ExecutionConfig(dtype="float32"))
    for name, tensor in own.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], tensor, rtol=0, atol=0)
    text = "def main(argv=None):\n    return 12345  # é€\n"
    assert found.tokenizer(text)["input_ids"] == own.tokenizer(text)["input_ids"]


def test_a_part_of_a_gguf_file_is_refused(made, tmp_path):
    """As large ones are published, with the other tensors elsewhere."""
    import gguf

    export(options(tmp_path, "bundled", "plain.gguf", "gguf-static"))
    reader = gguf.GGUFReader(tmp_path / "plain.gguf")
    arch, metadata = read_metadata(reader)
    metadata = [item for item in metadata if ".rope.scaling." not in item[0]]
    metadata.append(("split.count", 2, gguf.GGUFValueType.UINT16, None))
    own = [
        t
        for t in read_tensors(reader)
        if t.name not in ("rope_freqs.weight", "blk.4.ffn_up.weight")
    ]
    part = tmp_path / "part-00001-of-00002.gguf"
    write_file(part, arch, metadata, own)
    with pytest.raises(ValueError, match=r" 2 files.*llama-gguf-split --merge"):
        export(options(tmp_path, part, "out.gguf", "gguf"))
    assert not (tmp_path / "out.gguf").exists()
    for read in (inspect_model, import_pair, load_model):
        with pytest.raises(ValueError, match=r" 2 files.*llama-gguf-split --merge"):
            read(str(part))
    metadata = [item for item in metadata if item[0] != "split.count"]
    write_file(part, arch, metadata, own)
    with pytest.raises(ValueError, match=r": 1 .*layers\.4\.mlp\.up_proj.*gguf-split"):
        load_model(str(part), original_length=256, rope_scaling="replace")


TEMPLATES = {"default": "{{ messages }}", "tool_use": "T {{ messages }}", "with-dash": "D"}


@pytest.mark.parametrize("names", [(), ("default",), ("default", "tool_use", "with-dash")])
@pytest.mark.parametrize("listed", [True, False])
def test_chat_templates_are_kept(made, tmp_path, names, listed):
    """One or several, in the tokenizer's config or in files of their own."""
    import gguf

    source, found = tmp_path / "m", {name: TEMPLATES[name] for name in names}
    shutil.copytree(BUNDLED, source, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    if listed and names:
        config = json.loads((source / "tokenizer_config.json").read_text())
        config["chat_template"] = [{"name": k, "template": v} for k, v in found.items()]
        (source / "tokenizer_config.json").write_text(json.dumps(config))
    for name, template in found.items() if not listed else ():
        folder = source if name == "default" else source / "additional_chat_templates"
        folder.mkdir(exist_ok=True)
        file = "chat_template" if name == "default" else name
        (folder / f"{file}.jinja").write_text(template)
    export(options(tmp_path, source, "out.gguf", "gguf"))
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    written = {k: f.contents() for k, f in fields.items() if "chat_template" in k}
    expected = {f"tokenizer.chat_template.{k.replace('-', '_')}": v for k, v in found.items()}
    if names:
        expected["tokenizer.chat_template"] = expected.pop("tokenizer.chat_template.default")
    if len(names) > 1:
        expected["tokenizer.chat_templates"] = ["tool_use", "with_dash"]
    assert written == expected
    export(options(tmp_path, source, "out", "hf"))
    templates = [
        AutoTokenizer.from_pretrained(folder).chat_template for folder in (source, tmp_path / "out")
    ]
    assert templates[1] == templates[0]
    kept = tmp_path / "out" / "additional_chat_templates"
    assert {file.stem for file in kept.glob("*")} == set(() if listed else names[1:])


def test_a_gguf_file_keeps_its_quantisation(made, tmp_path):
    import gguf

    kinds = gguf.GGMLQuantizationType
    export(options(tmp_path, "bundled", "plain.gguf", "gguf-static"))
    reader = gguf.GGUFReader(tmp_path / "plain.gguf")
    arch, metadata = read_metadata(reader)
    quantised = []
    for tensor in read_tensors(reader):
        if len(tensor.shape) == 2 and tensor.name.startswith("blk"):
            values = gguf.quants.dequantize(tensor.data(), tensor.kind)
            packed = gguf.quants.quantize(values, kinds.Q8_0)
            tensor = dataclasses.replace(
                tensor,
                shape=packed.shape,
                dtype=packed.dtype,
                nbytes=packed.nbytes,
                kind=kinds.Q8_0,
                data=lambda packed=packed: packed,
            )
        quantised.append(tensor)
    write_file(tmp_path / "q8.gguf", arch, metadata, quantised)
    source = tmp_path / "q8.gguf"
    chosen = dataclasses.replace(options(tmp_path, source, "out.gguf", "gguf"), original_length=256)
    export(chosen)
    before = {t.name: t for t in read_tensors(gguf.GGUFReader(source))}
    after = {t.name: t for t in read_tensors(gguf.GGUFReader(tmp_path / "out.gguf"))}
    assert set(after) - set(before) == {LONG, SHORT}
    assert set(before) - set(after) == {"rope_freqs.weight"}
    for name in set(before) & set(after):
        assert after[name].kind == before[name].kind
        np.testing.assert_array_equal(after[name].data(), before[name].data())
    assert after["blk.0.attn_q.weight"].kind == kinds.Q8_0


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_a_gguf_file_keeps_its_alignment(made, tmp_path, alignment):
    import gguf

    export(options(tmp_path, "bundled", "plain.gguf", "gguf"))
    reader = gguf.GGUFReader(tmp_path / "plain.gguf")
    arch, metadata = read_metadata(reader)
    key = ("general.alignment", alignment, gguf.GGUFValueType.UINT32, None)
    write_file(tmp_path / "aligned.gguf", arch, [*metadata, key], read_tensors(reader))
    export(ExportOptions(str(tmp_path / "aligned.gguf"), tmp_path / "out.gguf", "gguf"))
    before = {tensor.name: tensor for tensor in reader.tensors}
    found = gguf.GGUFReader(tmp_path / "out.gguf")
    assert found.alignment == alignment
    assert {tensor.name for tensor in found.tensors} == before.keys()
    for tensor in found.tensors:
        assert tensor.data_offset % alignment == 0
        np.testing.assert_array_equal(tensor.data, before[tensor.name].data)


def test_tied_weights_may_be_stored_as_the_head(made, tmp_path):
    """transformers reads such a checkpoint; llama.cpp needs the embeddings."""
    import gguf

    source = shutil.copytree(BUNDLED, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for name, where in (("plain", "bundled"), ("head", source)):
        export(options(tmp_path, where, f"{name}.gguf", "gguf"))
    plain, head = (
        {t.name: t.data for t in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in ("plain", "head")
    )
    assert plain.keys() == head.keys() and "token_embd.weight" in head
    for name, data in plain.items():
        np.testing.assert_array_equal(head[name], data)


def test_an_empty_array_is_left_out(made, tmp_path, monkeypatch):
    """llama.cpp's converter wrote some; the library reads them, but does not write them."""
    import gguf

    kinds, pack = gguf.GGUFValueType, gguf.GGUFWriter._pack_val

    def packed(self, value, kind, add_vtype, sub_type=None):
        if value != []:
            return pack(self, value, kind, add_vtype, sub_type=sub_type)
        return struct.pack("<IIQ", kinds.ARRAY, kinds.STRING, 0)

    export(options(tmp_path, "bundled", "plain.gguf", "gguf"))
    reader = gguf.GGUFReader(tmp_path / "plain.gguf")
    arch, metadata = read_metadata(reader)
    tags = ("general.tags", [], kinds.ARRAY, kinds.STRING)
    with monkeypatch.context() as patched:
        patched.setattr(gguf.GGUFWriter, "_pack_val", packed)
        write_file(tmp_path / "tags.gguf", arch, [*metadata, tags], read_tensors(reader))
    assert "general.tags" in gguf.GGUFReader(tmp_path / "tags.gguf").fields
    export(ExportOptions(str(tmp_path / "tags.gguf"), tmp_path / "out.gguf", "gguf"))
    found = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert found.keys() == reader.fields.keys()


def test_an_export_is_exported_with_its_own_factors(made, tmp_path):
    """From one form to another and back."""
    export(options(tmp_path, "bundled", "one", "hf"))
    chain = [("two.gguf", "gguf"), ("three", "hf"), ("four", "hf-static"), ("five.gguf", "gguf")]
    source = "one"
    for name, form in chain:
        export(ExportOptions(str(tmp_path / source), tmp_path / name, form, dtype="float32"))
        found = import_pair(str(tmp_path / name))
        if name == "five.gguf":  # of a static export, which has no short factors
            assert (found.long, found.short.factors) == (made.long, made.long.factors)
        else:
            assert found == made
        source = name
    one, three = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("one", "three"))
    for key in ("rope_parameters", "rope_scaling", "max_position_embeddings", "rope_theta"):
        assert one[key] == three[key]
    for name in ("short_factors", "target"):
        asked = ExportOptions(str(tmp_path / "one"), tmp_path / "no", **{name: "yarn"})
        with pytest.raises(ValueError, match=f"{name} is yarn, and .*one has its own factors"):
            export(asked)


@pytest.mark.parametrize("form", ["hf", "hf-static", "gguf", "gguf-static"])
def test_an_export_comes_back_exactly(form, made, tmp_path):
    name = "out.gguf" if form.startswith("gguf") else "out"
    export(options(tmp_path, "bundled", name, form))
    assert import_pair(str(tmp_path / name)) == made


def test_without_our_note_the_factors_come_from_the_tensors(made, tmp_path):
    import gguf

    export(options(tmp_path, "bundled", "out.gguf", "gguf"))
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    arch, metadata = read_metadata(reader)
    metadata = [item for item in metadata if item[0] != "longrope.intent"]
    write_file(tmp_path / "bare.gguf", arch, metadata, read_tensors(reader))
    found = import_pair(str(tmp_path / "bare.gguf"))
    for ours, theirs in ((made.short, found.short), (made.long, found.long)):
        np.testing.assert_allclose(theirs.factors, ours.factors, rtol=1e-6)
        assert theirs.attention_factor == pytest.approx(ours.attention_factor)
        assert theirs.max_position_embeddings == ours.max_position_embeddings


def test_a_note_of_the_users_is_not_taken_for_our_card(checkpoints, micro_models, tmp_path):
    pair(micro_models("llama")).long.save(tmp_path / "long.json")
    (tmp_path / "notes.md").write_text("dear")
    out = tmp_path / "notes.gguf"
    with pytest.raises(ValueError, match=r"notes\.md .*force=True"):
        export(
            ExportOptions(
                str(checkpoints("llama")), out, "gguf", long_factors=str(tmp_path / "long.json")
            )
        )
    assert (tmp_path / "notes.md").read_text() == "dear"
    assert not out.exists()


def test_an_architecture_without_factor_tensors_is_refused(made, tmp_path):
    import gguf

    export(options(tmp_path, "bundled", "plain.gguf", "gguf-static"))
    reader = gguf.GGUFReader(tmp_path / "plain.gguf")
    _, metadata = read_metadata(reader)
    metadata = [
        (key.replace("llama.", "qwen2.", 1), value, kind, member)
        for key, value, kind, member in metadata
    ]
    write_file(tmp_path / "qwen.gguf", "qwen2", metadata, read_tensors(reader))
    chosen = dataclasses.replace(
        options(tmp_path, tmp_path / "qwen.gguf", "out.gguf", "gguf"), original_length=256
    )
    with pytest.raises(ValueError, match=r"'qwen2'.*format='hf'"):
        export(chosen)
    assert not (tmp_path / "out.gguf").exists()


def test_frequencies_in_the_weights_are_left_out(checkpoints, micro_models, tmp_path):
    """As checkpoints of 2023 have them; llama.cpp has no such tensor in its Llama."""
    import gguf
    from safetensors.numpy import load_file, save_file

    made = pair(micro_models("llama"))
    made.long.save(tmp_path / "long.json")
    source = shutil.copytree(checkpoints("llama"), tmp_path / "source")
    found = []
    for name in ("plain.gguf", "old.gguf"):
        how = {"long_factors": str(tmp_path / "long.json")}
        export(ExportOptions(str(source), tmp_path / name, "gguf-static", **how))
        found.append({t.name for t in gguf.GGUFReader(tmp_path / name).tensors})
        tensors = load_file(source / "model.safetensors")
        for layer in range(2):
            key = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
            tensors[key] = np.ones(8, dtype=np.float32)
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert found[0] == found[1]


def test_a_checkpoint_that_only_llama_cpps_converter_knows_is_refused(
    checkpoints, micro_models, tmp_path
):
    for family, why in (
        ("qwen2", "Qwen2ForCausalLM.*convert_hf_to_gguf.py.*`model`"),
        ("mistral", "sliding_window is 24.*format='hf'"),
    ):
        made = pair(micro_models(family))
        made.short.save(tmp_path / "short.json")
        made.long.save(tmp_path / "long.json")
        with pytest.raises(ValueError, match=why):
            export(options(tmp_path, checkpoints(family), "out.gguf", "gguf"))


def test_a_tokenizer_of_another_kind_is_refused(checkpoints, micro_models, tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    for file in checkpoints("llama").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    content = json.loads((source / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer.json").write_text(json.dumps(content))
    made = pair(micro_models("llama"))
    made.short.save(tmp_path / "short.json")
    made.long.save(tmp_path / "long.json")
    with pytest.raises(ValueError, match=r"GGUF \(.*pre-tokenizer"):
        export(options(tmp_path, source, "out.gguf", "gguf"))


@pytest.mark.parametrize("head", ["trained", "equal", "none"])
def test_the_weights_decide_whether_a_head_is_written(
    head, checkpoints, micro_models, ids, tmp_path
):
    """``tie_word_embeddings`` is true, whatever the weights are."""
    import gguf
    import torch
    from safetensors.torch import load_file, save_file

    source = shutil.copytree(checkpoints("llama"), tmp_path / "model")
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    trained = tensors.pop("lm_head.weight")
    if head != "none":
        equal = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"] = trained if head == "trained" else equal
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    made = pair(micro_models("llama"))
    made.short.save(tmp_path / "short.json")
    made.long.save(tmp_path / "long.json")
    export(options(tmp_path, source, "out.gguf", "gguf"))
    written = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert ("output.weight" in written) == (head == "trained")
    if head == "trained":
        np.testing.assert_array_equal(written["output.weight"], trained.numpy())
        execution = ExecutionConfig(dtype="float32")
        scaling = {"rope_scaling": "replace", "original_length": 64}
        loaded = load_model(str(tmp_path / "out.gguf"), execution, **scaling)
        with torch.no_grad():
            expected = micro_models("llama")(input_ids=ids).logits
            torch.testing.assert_close(loaded.model(input_ids=ids).logits, expected)


def with_tokenizer(target, edit, **config):
    """A copy of the bundled model whose tokenizer is edited."""
    shutil.copytree(BUNDLED, target)
    file = target / "tokenizer.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    file = target / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return target


def add(content, token, number, special=True):
    content["added_tokens"].append(
        content["added_tokens"][0] | {"id": number, "content": token, "special": special}
    )


def test_added_tokens_beyond_the_embeddings_are_left_out(made, tmp_path):
    from gguf import GGUFReader

    def edit(content):
        add(content, "<pad>", 1536)
        add(content, "<image>", 1576, special=False)

    padded = with_tokenizer(tmp_path / "padded", edit, pad_token="<pad>")
    export(options(tmp_path, "bundled", "a.gguf", "gguf"))
    export(options(tmp_path, padded, "b.gguf", "gguf"))
    plain, found = (
        {key: value for key, value, *_ in read_metadata(GGUFReader(tmp_path / name))[1]}
        for name in ("a.gguf", "b.gguf")
    )
    pad = "tokenizer.ggml.padding_token_id"
    assert plain.pop(pad) == 2
    assert pad not in found
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"):
        assert list(found[key]) == list(plain[key])
    assert len(found["tokenizer.ggml.tokens"]) == 1536


def test_a_vocabulary_beyond_the_embeddings_is_refused(made, tmp_path):
    def one_more(content):
        content["model"]["vocab"]["zzz"] = 1536

    def bos_beyond(content):
        add(content, "<s>", 1600)
        special = {"<s>": {"id": "<s>", "ids": [1600], "tokens": ["<s>"]}}
        single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}]
        single.append({"Sequence": {"id": "A", "type_id": 0}})
        content["post_processor"] |= {"single": single, "special_tokens": special, "pair": single}

    more = with_tokenizer(tmp_path / "more", one_more)
    with pytest.raises(ValueError, match=r"tokenizer\.json: token id 1,536 .* of 1,536 tokens"):
        export(options(tmp_path, more, "m.gguf", "gguf"))
    beyond = with_tokenizer(tmp_path / "bos", bos_beyond, bos_token="<s>")
    with pytest.raises(ValueError, match=r"BOS: token id 1,600 .* of 1,536 tokens"):
        export(options(tmp_path, beyond, "m.gguf", "gguf"))
    assert not (tmp_path / "m.gguf").exists()
