"""A long text's answers, its keys and values made once, against each answer in a row of its own."""

import numpy as np
import pytest
import torch

from conftest import RECOVERY, pair
from longrope.evaluate import lm_eval_model as harness
from longrope.execution import ExecutionConfig
from longrope.models.load import load_model

FAMILIES = ("llama", "mistral", "qwen2", "phi3", "gemma2", "gemma3", "gpt_neox", "glm", "cohere")
STATEFUL = ("lfm2", "qwen3_5")
LENGTHS = (1, 2, 3, 7, 12)  # of the answers


def ask(model, requests, monkeypatch, long):
    monkeypatch.setattr(harness, "_LONG", long)
    prefilled = []
    prefill = model.forward.prefill
    model.forward.prefill = lambda ids: prefilled.append(ids.shape[1]) or prefill(ids)
    try:
        return model._loglikelihood_tokens(requests), prefilled
    finally:
        model.forward.prefill = prefill


@pytest.mark.parametrize("family", FAMILIES + STATEFUL)
def test_answers_after_one_text(checkpoints, family, monkeypatch):
    loaded = load_model(str(checkpoints(family)), ExecutionConfig(dtype="float32", chunk_size=32))
    rng = np.random.default_rng(0)
    # Of the middle text's answers some fit the recovery length and some do not.
    texts = [rng.integers(3, 1500, n).tolist() for n in (30, RECOVERY - 4, RECOVERY + 9)]
    requests = [
        (("", ""), text, rng.integers(3, 1500, n).tolist()) for text in texts for n in LENGTHS
    ]
    requests += [(("", ""), texts[0], [token]) for token in (5, 6)]
    order = rng.permutation(len(requests))
    requests = [requests[i] for i in order]
    model = harness.HarnessModel(loaded, pair(loaded.model).choose, 512, "")
    rows, never = ask(model, requests, monkeypatch, 10_000)
    once, prefilled = ask(model, requests, monkeypatch, 20)
    assert never == []
    # The middle text under either rescale.
    expected = [30, RECOVERY - 4, RECOVERY - 4, RECOVERY + 9]
    assert sorted(prefilled) == ([] if family in STATEFUL else expected)
    torch.testing.assert_close(
        torch.tensor([likelihood for likelihood, _ in once]),
        torch.tensor([likelihood for likelihood, _ in rows]),
        atol=1e-3,
        rtol=1e-4,
    )
    assert [greedy for _, greedy in once] == [greedy for _, greedy in rows]


def test_the_greedy_answer_is_known_as_one(checkpoints, monkeypatch):
    """The only way to True: the model's own tokens."""
    loaded = load_model(str(checkpoints("llama")), ExecutionConfig(dtype="float32", chunk_size=32))
    model = harness.HarnessModel(loaded, pair(loaded.model).choose, 512, "")
    text = list(range(3, 120))
    answer: list[int] = []
    with torch.inference_mode(), harness.rescaled(loaded.model, model.choose(len(text) + 4)):
        for _ in range(4):
            logits, _ = model.forward.prefill(torch.tensor([text + answer]))
            answer.append(int(logits.argmax()))
    others = [[*answer[:3], (answer[3] + 1) % 1500], answer[:2]]
    requests = [(("", ""), text, tokens) for tokens in (answer, *others)]
    found, prefilled = ask(model, requests, monkeypatch, 20)
    assert prefilled == [117]
    assert [greedy for _, greedy in found] == [True, False, True]


def test_no_room_for_every_layers_keys(checkpoints, monkeypatch):
    """A GPU that cannot hold them: every answer in a row of its own, with the same result."""
    loaded = load_model(str(checkpoints("llama")), ExecutionConfig(dtype="float32", chunk_size=32))
    model = harness.HarnessModel(loaded, pair(loaded.model).choose, 512, "")
    requests = [(("", ""), list(range(3, 90)), answer) for answer in ([7, 8], [9, 10, 11])]
    expected, _ = ask(model, requests, monkeypatch, 20)

    def full(*_):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(harness.HarnessModel, "_after", full)
    found, _ = ask(model, requests, monkeypatch, 20)
    for (one, _), (other, _) in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_offloaded_weights_come_once_for_all_answers(checkpoints, monkeypatch):
    requests = [(("", ""), list(range(3, 90)), answer) for answer in ([7, 8], [9, 10, 11])]
    found = {}
    for offload in (False, True):
        loaded = load_model(
            str(checkpoints("llama")),
            ExecutionConfig(dtype="float32", chunk_size=32, offload_weights=offload),
        )
        model = harness.HarnessModel(loaded, pair(loaded.model).choose, 512, "")
        found[offload], prefilled = ask(model, requests, monkeypatch, 20)
        assert prefilled == ([] if offload else [87])
    for (one, _), (other, _) in zip(found[False], found[True], strict=True):
        assert one == pytest.approx(other, abs=1e-4)
