"""Token ids of prompts and of long texts, and the tokens that a model has no embedding for."""

import importlib.metadata
import json
import random
import re
import shutil
import zlib

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from longrope.data import encoding
from longrope.data.encoding import bos_tokens, check_ids, encode, encode_prompt, tokenizer_digest
from longrope.data.stdlib import library_texts
from longrope.models.bundled import BUNDLED
from program import start, succeeds


@pytest.fixture(scope="module")
def bundled():
    return AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture(scope="module")
def text():
    return library_texts(held_out=True)["argparse"][:60_000]


def with_template(tokenizer, template):
    """The same tokenizer with another post-processor, such as one that appends EOS."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<|bos|>", "<|eos|>")]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>"
    )


TEMPLATES = {
    "$A": [],
    "$A <|eos|>": [],
    "<|bos|> $A": [0],
    "<|bos|> $A <|eos|>": [0],
    "<|bos|> $A <|eos|> <|eos|>": [0],
    "<|bos|> <|eos|> $A": [0, 1],  # as GLM's [gMASK]<sop>
}


@pytest.mark.parametrize(("template", "before"), TEMPLATES.items())
def test_prompts_have_the_bos_of_the_tokenizer_and_no_eos(bundled, template, before):
    tokenizer = with_template(bundled, template)
    bare = bundled("import os", add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, "import os") == before + bare
    assert bos_tokens(tokenizer) == before
    if before != [0, 1]:
        assert encode_prompt(tokenizer, "<|bos|>import os") == [0, *bare]  # never twice
    assert encode(tokenizer, ["import os"])[0].tolist() == bare


def test_a_tokenizer_that_appends_eos_changes_no_result(bundled, tmp_path):
    from longrope.data.prompts import passkey_prompt
    from longrope.evaluate.lm_eval_model import HarnessModel
    from longrope.models.load import load_model
    from longrope.search.objective import passkey_questions

    loaded = load_model("bundled")
    appending = with_template(bundled, "<|bos|> $A <|eos|>")
    asked = [("def f(x):\n    return", " x"), ("import", " os"), ("", "import")]
    requests = [type("Request", (), {"args": pair}) for pair in asked]
    found = []
    for tokenizer in (bundled, appending):
        object.__setattr__(loaded, "tokenizer", tokenizer)
        model = HarnessModel(loaded, lambda _: None, 256, "")
        prompts = [passkey_prompt(tokenizer, 200, 0.5, random.Random(1))]
        prompts += passkey_questions(tokenizer, 200, 2, 0)
        ids = [prompt.ids.tolist() for prompt in prompts]
        found.append((ids, [p.answer_tokens for p in prompts], model.loglikelihood(requests)))
    assert found[0] == found[1]
    shutil.copytree(BUNDLED, tmp_path / "m")
    file = tmp_path / "m" / "tokenizer.json"
    file.write_text(appending.backend_tokenizer.to_str())
    generate = ["--prompt", "import os\n", "--max-new-tokens", 8]
    texts = [succeeds("generate", model, *generate) for model in ("bundled", tmp_path / "m")]
    assert texts[0] == texts[1] != "\n"


def sentencepiece(texts):
    """A tokenizer as Llama 2's: no pre-tokenizer, and a space before every text."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=special, show_progress=False)
    trained.train_from_iterator([one.replace("\n", " ") for one in texts], trainer)
    content = json.loads(trained.to_str())
    normalizer = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    trained.normalizer = normalizers.Sequence(normalizer)
    content["normalizer"] = json.loads(trained.to_str())["normalizer"]
    content["pre_tokenizer"] = None
    content["model"] |= {"byte_fallback": True, "fuse_unk": True}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))


def gpt2(texts):
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=trained)


WRITTEN = {
    "lines": lambda text: text,
    "empty lines": lambda text: text.replace("\n", "\n\n\n"),
    "crlf": lambda text: text.replace("\n", "\r\n"),
    "one line": lambda text: text.replace("\n", " "),
    "no spaces": lambda text: re.sub(r"\s", "", text),
    "accents": lambda text: text.replace("e", "é").replace("a", "か"),
}


@pytest.mark.parametrize("kind", ["bundled", "sentencepiece", "gpt2"])
def test_pieces_have_the_tokens_of_the_whole(bundled, text, kind, monkeypatch):
    monkeypatch.setattr(encoding, "_PIECE", 1000)
    monkeypatch.setattr(encoding, "_TOGETHER", 4000)
    made = {"bundled": lambda texts: bundled, "sentencepiece": sentencepiece, "gpt2": gpt2}
    tokenizer = made[kind]([text])
    for name, write in WRITTEN.items():
        written = write(text)
        whole = tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"]
        pieces = list(encoding._pieces(tokenizer, [written]))
        assert "".join(piece for _, _, piece in pieces) == written
        assert len(pieces) > 20, name
        short, found, empty = encode(tokenizer, ["import os", written, ""])
        assert found.dtype == np.int32
        assert np.array_equal(found, whole), name
        assert len(short) and not len(empty)


def test_a_tokenizer_that_cannot_be_cut_gets_the_whole(monkeypatch):
    """Its tokens depend on everything before: no place is safe."""

    def tokenizer(texts, **_):
        def one(text):
            return [zlib.crc32(text[: i + 1].encode()) >> 1 for i in range(len(text))]

        return {"input_ids": one(texts) if isinstance(texts, str) else [*map(one, texts)]}

    monkeypatch.setattr(encoding, "_PIECE", 300)
    text = "Some words. And more.\n" * 60
    assert encode(tokenizer, [text])[0].tolist() == tokenizer(text)["input_ids"]


def test_a_long_text_is_never_given_whole(bundled, text):
    given = []

    class Recording:
        def __call__(self, texts, **how):
            given.append(sum(map(len, [texts] if isinstance(texts, str) else texts)))
            return bundled(texts, **how)

    long = "\n".join([text] * 20)
    found = encode(Recording(), [long])[0]
    assert max(given) <= encoding._TOGETHER + encoding._PIECE
    assert len(found) == pytest.approx(20 * len(encode(bundled, [text])[0]), abs=20)


@pytest.mark.slow
def test_memory_is_at_most_ten_times_the_text(tmp_path):
    code = """
import resource, sys
from longrope.data.windows import load_documents
from longrope.models.load import load_tokenizer
tokenizer = load_tokenizer("bundled")
tokenizer("warm up")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(document,) = load_documents(tokenizer, [sys.argv[1]])
print(len(document), 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""
    text = library_texts()["pydoc_topics"]
    file = tmp_path / "long.txt"
    file.write_text((text * (12_000_000 // len(text) + 1))[:12_000_000])
    done = start(file, code=code, env={"LONGROPE_CACHE": str(tmp_path)}).wait()
    tokens, taken = map(int, done.stdout.split())
    assert tokens > 3_000_000
    assert taken < 10 * 12_000_000


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_ids_outside_the_embeddings_are_named(kind):
    check_ids(kind([0, 5, 9]), 10, "x")
    check_ids(kind([]), 10, "x")
    for ids, named in (([3, 10], "10"), ([[1], [-1]], "-1"), ([1_000_000], "1,000,000")):
        with pytest.raises(ValueError, match=f"^book: token id {named} .* of 10 tokens"):
            check_ids(kind(ids), 10, "book")


def test_the_digest_changes_with_all_that_decides_tokens(bundled, monkeypatch):
    first = tokenizer_digest(bundled)
    assert tokenizer_digest(AutoTokenizer.from_pretrained(BUNDLED)) == first
    others = [with_template(bundled, "$A"), AutoTokenizer.from_pretrained(BUNDLED)]
    others[1].add_tokens(["import"])
    split = AutoTokenizer.from_pretrained(BUNDLED, split_special_tokens=True)
    digests = {first, *map(tokenizer_digest, [*others, split])}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0")
    assert len({*digests, tokenizer_digest(bundled)}) == 5
