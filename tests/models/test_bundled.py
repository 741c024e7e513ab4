"""What the card of the bundled model says of it."""

import random

import pytest
import torch

from longrope.data.documents import read_documents
from longrope.data.encoding import bos_tokens
from longrope.data.windows import tokenize
from longrope.evaluate.perplexity import score
from longrope.layerwise.forward import LongForward
from longrope.models.load import load_model

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
    "them. I will quiz you about the important information there.\n"
)
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)


@pytest.fixture(scope="module")
def bundled():
    return load_model("bundled")


def test_passkey_inside_its_window(bundled):
    rng, correct = random.Random(1), 0
    for trial in range(30):
        key = "".join(rng.choice("0123456789") for _ in range(5))
        lines = [FILLER] * (trial % 5)
        lines.insert(
            rng.randrange(len(lines) + 1),
            f"The pass key is {key}. Remember it. {key} is the pass key.\n",
        )
        prompt = TASK + "".join(lines) + "What is the pass key? The pass key is"
        ids = torch.tensor([bundled.tokenizer(prompt)["input_ids"]])
        assert ids.shape[1] < 256
        answer = bundled.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )[0, ids.shape[1] :]
        correct += key in bundled.tokenizer.decode(answer)
    assert correct >= 27


def test_it_breaks_beyond_its_window(bundled):
    documents = tokenize(read_documents(["python-library-held-out"]), bundled.tokenizer)
    forward, bos = LongForward(bundled.model), bos_tokens(bundled.tokenizer)
    options = {"bos": bos, "lengths": [128, 256, 1024], "tokens_per_document": 1024}
    short, whole, beyond = (
        score(forward, documents, length, **options).perplexity for length in (128, 256, 1024)
    )
    assert whole < short < 1.5 * whole
    assert beyond > 4 * whole
