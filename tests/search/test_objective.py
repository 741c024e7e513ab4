"""What a search minimises, against transformers' own logits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from longrope.data.prompts import passkey_prompt
from longrope.evaluate.retrieval import retrieve
from longrope.execution import ExecutionConfig
from longrope.layerwise.forward import LongForward
from longrope.models.load import load_model
from longrope.rope.apply import rescaled
from longrope.search.objective import Objective, passkey_questions


@pytest.fixture(scope="module")
def bundled():
    return load_model("bundled", ExecutionConfig(dtype="float32"))


def plain(model, ids) -> torch.Tensor:
    """Losses from full logits, shape (tokens − 1,)."""
    ids = torch.from_numpy(np.asarray(ids, dtype=np.int64))
    with torch.inference_mode():
        logits = model(ids[None]).logits[0, :-1].double()
    return F.cross_entropy(logits, ids[1:], reduction="none")


def test_windows_and_answers_as_transformers_has_them(bundled):
    windows = np.random.default_rng(0).integers(3, 1500, (2, 300))
    questions = passkey_questions(bundled.tokenizer, 512, 2, seed=0)
    rescale = bundled.info.rescale("pi", 512)
    found = Objective(LongForward(bundled.model, chunk_size=128), windows, questions)(rescale).loss
    with rescaled(bundled.model, rescale):
        text = torch.cat([plain(bundled.model, window) for window in windows]).mean()
        answers = torch.cat(
            [plain(bundled.model, q.ids)[-q.answer_tokens :] for q in questions]
        ).mean()
    assert found == pytest.approx(float(text + answers), rel=1e-5)
    assert answers > 0.1  # they do count
    assert Objective(LongForward(bundled.model), windows)(rescale).loss == pytest.approx(
        float(text), rel=1e-5
    )


def test_the_loss_on_all_windows_is_the_mean_of_the_single_ones_and_so_is_its_gradient(bundled):
    windows = np.random.default_rng(1).integers(3, 1500, (3, 200))
    questions = passkey_questions(bundled.tokenizer, 256, 2, seed=0)
    objective = Objective(LongForward(bundled.model, chunk_size=128), windows, questions)
    rescale = bundled.info.rescale("yarn", 512)
    singles = [objective(rescale, window, grad=True) for window in range(3)]
    whole = objective(rescale, grad=True)
    assert np.mean([single.loss for single in singles]) == pytest.approx(whole.loss, rel=1e-6)
    assert objective(rescale).loss == pytest.approx(whole.loss, rel=1e-5)
    each = [objective(rescale, window).loss for window in range(3)]
    assert objective(rescale).window_losses == pytest.approx(each, rel=1e-5)
    assert objective(rescale, 1).loss == pytest.approx(singles[1].loss, rel=1e-5)
    grads = np.array([single.grad for single in singles])
    np.testing.assert_allclose(grads.mean(axis=0), whole.grad, rtol=1e-4, atol=1e-7)


def test_questions_are_not_those_of_the_evaluation(bundled):
    searched = passkey_questions(bundled.tokenizer, 512, 3, seed=0)
    assert [len(q.ids) > 400 for q in searched] == [True] * 3
    again = passkey_questions(bundled.tokenizer, 512, 3, seed=0)
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(searched, again, strict=True))
    evaluated = []

    def noted(length, depth, rng):
        evaluated.append(passkey_prompt(bundled.tokenizer, length, depth, rng))
        return evaluated[-1]

    retrieve(LongForward(bundled.model), noted, 512, None, trials=3, seed=0)
    assert len(evaluated) == 3
    assert not any(np.array_equal(a.ids, b.ids) for a in searched for b in evaluated)


def test_a_length_without_room_is_refused(bundled):
    with pytest.raises(ValueError, match=r"`passkey_prompts`: .* 32;"):
        passkey_questions(bundled.tokenizer, 32, 1, seed=0)
    assert passkey_questions(bundled.tokenizer, 32, 0, seed=0) == []
