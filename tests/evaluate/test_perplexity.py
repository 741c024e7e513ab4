import math

import numpy as np
import pytest
import torch

from conftest import FAMILIES, micro_model
from longrope.data.windows import TokenDocument
from longrope.evaluate.perplexity import Scores, paired_difference, score
from longrope.evaluate.statistics import ratio_standard_error
from longrope.layerwise.forward import LongForward


def documents(*sizes):
    rng = np.random.default_rng(0)
    return [
        TokenDocument(f"d{i}", (f"d{i}",), rng.integers(3, 1536, n).astype(np.int32))
        for i, n in enumerate(sizes)
    ]


@pytest.fixture(scope="module")
def model64():
    return micro_model(FAMILIES["llama"]()).double()


@torch.no_grad()
def brute_force(model, docs, length, bos):
    """Mean loss over every whole window, one plain float64 forward each.

    BOS tokens count as tokens of the window, so its last ones do not fit.
    """
    total, count = 0.0, 0
    for document in docs:
        for start in range(0, len(document) - length + 1, length):
            window = document.ids[start : start + length].tolist()
            ids = torch.tensor([[*bos, *window[: length - len(bos)]]])
            probabilities = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            for position in range(max(len(bos), 1), length):
                total -= probabilities[position - 1, ids[0, position]].item()
                count += 1
    return total / count, count


@pytest.mark.parametrize("bos", [[], [0], [5, 0]])
@pytest.mark.parametrize("length", [16, 40, 64])
def test_equals_brute_force(model64, bos, length):
    docs = documents(200, 64, 131)
    found = score(LongForward(model64, 33), docs, length, bos=bos)
    mean, count = brute_force(model64, docs, length, bos)
    assert found.mean == pytest.approx(mean, rel=1e-6)
    assert found.tokens == count
    assert found.windows == sum(len(d) // length for d in docs)
    assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-6)


@pytest.mark.parametrize("bos", [[], [0], [5, 0]])
def test_lengths_are_scored_on_the_same_tokens(model64, bos):
    docs = documents(200, 70, 131)
    forward = LongForward(model64)
    scores = {n: score(forward, docs, n, bos=bos, lengths=[16, 32, 64]) for n in (16, 32, 64)}
    scored = {
        n: [np.isfinite(losses).reshape(-1) for losses in s.documents] for n, s in scores.items()
    }
    for n in (32, 64):
        assert all(np.array_equal(a, b) for a, b in zip(scored[16], scored[n], strict=True))
    assert scores[16].windows == 4 * scores[64].windows == 4 * (3 + 1 + 2)
    paired_difference(scores[16], scores[64])  # and so they can be paired


def test_lengths_must_tile(model64):
    with pytest.raises(ValueError, match="24 does not divide 64"):
        score(LongForward(model64), documents(200), 24, bos=[0], lengths=[24, 64])


@pytest.mark.parametrize("bos", [[], [0], [5, 0]])
def test_a_sliding_window_scores_every_token_once_with_more_context(model64, bos):
    docs = documents(128)
    forward = LongForward(model64)
    found = score(forward, docs, 64, bos=bos, stride=16)
    assert found.tokens == 128 - max(len(bos), 1)
    apart = score(forward, docs, 64, bos=bos, stride=64)  # no token is in two windows
    assert apart.tokens == 128 - 2 * max(len(bos), 1)
    if bos:
        return
    # The second window's last 16 tokens, each with at least 48 before it.
    whole = forward.losses(torch.from_numpy(docs[0].ids[16:80].astype(np.int64))[None])[0]
    np.testing.assert_allclose(found.documents[0][1, 48:], whole[47:].double())
    with pytest.raises(ValueError, match="stride is 65"):
        score(forward, docs, 64, bos=[], stride=65)


def test_the_tail_is_what_lies_beyond():
    losses = np.arange(20.0).reshape(2, 10)
    tail = Scores(10, (losses,)).tail(6)
    assert tail.mean == np.mean(losses[:, 6:])
    assert tail.tokens == 8


def test_tokens_per_document(model64):
    found = score(LongForward(model64), documents(200, 100), 32, bos=[0], tokens_per_document=64)
    assert found.windows == 4


def test_a_loss_that_is_nan_is_not_left_out(monkeypatch, model64):
    forward = LongForward(model64)
    original = forward.losses

    def broken(ids):
        losses = original(ids)
        losses[0, 5] = torch.nan
        return losses

    monkeypatch.setattr(forward, "losses", broken)
    found = score(forward, documents(100, 64), 64, bos=[0])
    assert found.tokens == 2 * 63
    assert found.mean == found.perplexity == math.inf
    assert found.standard_error is None
    assert paired_difference(found, found).better is None


def test_by_position():
    losses = np.log(np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]))
    assert Scores(4, (losses,)).by_position(2) == [
        (0, 2, pytest.approx(math.sqrt(2))),
        (2, 4, pytest.approx(math.sqrt(12))),
    ]


def test_standard_error_is_that_of_resampled_documents():
    rng = np.random.default_rng(0)
    counts = rng.integers(500, 1500, 400)
    sums = counts * (3 + rng.normal(0, 0.4, 400))
    found = ratio_standard_error(sums, counts)
    picks = rng.integers(0, 400, (3000, 400))
    bootstrap = (sums[picks].sum(1) / counts[picks].sum(1)).std()
    assert found == pytest.approx(bootstrap, rel=0.06)
    assert ratio_standard_error(np.ones(1), np.ones(1)) is None


def test_better_means_more_than_twice_the_standard_error():
    rng = np.random.default_rng(0)
    base = [rng.normal(3, 1, (2, 50)) for _ in range(20)]
    noise = [rng.normal(0, 0.1, (2, 50)) for _ in base]
    one = Scores(50, tuple(base))
    same = Scores(50, tuple(b + n for b, n in zip(base, noise, strict=True)))
    lower = Scores(50, tuple(b - 0.05 + n for b, n in zip(base, noise, strict=True)))
    difference = paired_difference(lower, one)
    assert difference.better
    assert difference.mean == pytest.approx(-0.05, abs=0.01)
    # Paired by document, the documents' own spread is no noise.
    assert difference.standard_error < 0.1 * one.standard_error / one.perplexity
    assert paired_difference(same, one).better is None
    assert paired_difference(one, lower).better is False


def test_one_document_has_the_error_of_its_blocks_at_every_window_length():
    rng = np.random.default_rng(0)
    losses = rng.normal(3, 1, 6400)
    short, long = Scores(100, (losses.reshape(64, 100),)), Scores(6400, (losses[None],))
    blocks = losses.reshape(16, 400).mean(axis=1)
    for found in (short, long):
        error = found.standard_error / found.perplexity
        assert error == pytest.approx(blocks.std(ddof=1) / 4)
    lower = Scores(6400, (losses[None] - 0.05 + rng.normal(0, 0.1, 6400),))
    assert paired_difference(lower, long).better
    assert paired_difference(long, long).better is None
