import numpy as np
import pytest
import torch

from longrope.data.windows import TokenDocument
from longrope.train.dataset import LongContextDataset


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    from longrope.models.bundled import BUNDLED

    return AutoTokenizer.from_pretrained(BUNDLED)


def documents(*lengths):
    return [
        TokenDocument(str(i), (str(i),), np.arange(1000 * i, 1000 * i + n, dtype=np.int32) + 10)
        for i, n in enumerate(lengths, 1)
    ]


def test_every_sequence_has_bos_and_eos(tokenizer):
    sequences = LongContextDataset(documents(300, 200), tokenizer, 64, 20, seed=3)
    assert len(sequences) == 20
    for i in range(20):
        ids = sequences[i]["input_ids"]
        assert ids.shape == (64,)
        assert ids.dtype == torch.int64
        assert (ids[0], ids[-1]) == (0, 1)
        assert (sequences[i]["weights"] == 1).all()


def test_an_epoch_uses_the_text_once(tokenizer):
    sequences = LongContextDataset(documents(600, 402), tokenizer, 64, 100)
    assert sequences.distinct == (600 + 402 + 4) // 62
    assert sequences.epochs == pytest.approx(100 / sequences.distinct)
    for epoch in (0, 1, 2):
        rows = [
            sequences[epoch * sequences.distinct + i]["input_ids"][1:-1]
            for i in range(sequences.distinct)
        ]
        text = torch.cat(rows)
        text = text[text > 2]
        assert len(text) == len(set(text.tolist()))
    first = [sequences[i]["input_ids"].tolist() for i in range(sequences.distinct)]
    second = [
        sequences[sequences.distinct + i]["input_ids"].tolist() for i in range(sequences.distinct)
    ]
    assert first != second


def test_an_item_depends_only_on_seed_and_index(tokenizer):
    options = {"seed": 5, "passkey_share": 0.5, "answer_share": 0.2}
    docs = documents(3000, 2000)
    one = LongContextDataset(docs, tokenizer, 256, 10, **options)
    other = LongContextDataset(docs[::-1], tokenizer, 256, 50, **options)
    for i in (7, 0, 3):
        for name in ("input_ids", "weights"):
            assert torch.equal(one[i][name], other[i][name])
    assert not torch.equal(one[0]["input_ids"], one[1]["input_ids"])


def test_positions_jump_as_far_as_the_reach(tokenizer):
    options = {"passkey_share": 0.5, "answer_share": 0.2, "reach": 2000}
    sequences = LongContextDataset(documents(5000), tokenizer, 256, 300, **options)
    between, sizes = 0, []
    for sequence in (sequences[i] for i in range(300)):
        rotary_positions = sequence["rotary_positions"]
        steps = rotary_positions.diff()
        jump = steps > 1
        assert rotary_positions[0] == 0
        assert rotary_positions[-1] < 2000
        assert (steps[~jump] == 1).all()
        assert jump.sum() <= 1
        sizes.append(int(rotary_positions[-1]) - 255)
        if (heavy := sequence["weights"] > 1).any() and jump.any():
            at = int(jump.nonzero()[0]) + 1
            assert at < int(heavy.nonzero()[0])  # never after the question
            answer = tokenizer.decode(sequence["input_ids"][heavy]).strip()
            between += answer not in tokenizer.decode(
                sequence["input_ids"][at : int(heavy.nonzero()[0])]
            )
    assert min(sizes) < 100
    assert max(sizes) > 1600
    assert 40 < between < 110  # about half of the keys are before the jump
    assert (
        "rotary_positions"
        not in LongContextDataset(documents(5000), tokenizer, 256, 3, reach=256)[0]
    )


def test_a_share_of_passkey_prompts_with_the_answer_weighted(tokenizer):
    sequences = LongContextDataset(
        documents(5000), tokenizer, 256, 200, passkey_share=0.25, answer_share=0.2
    )
    asked = [p for p in (sequences[i] for i in range(200)) if (p["weights"] > 1).any()]
    assert 30 <= len(asked) <= 70
    for sequence in asked:
        heavy = sequence["weights"] > 1
        assert sequence["weights"][heavy].sum().item() == pytest.approx(0.2 * 256)
        answer = tokenizer.decode(sequence["input_ids"][heavy]).strip()
        text = tokenizer.decode(sequence["input_ids"])
        assert len(answer) == 5
        assert answer.isdigit()
        assert f"The pass key is {answer}. Remember it." in text
        assert f"What is the pass key? The pass key is {answer}" in text


@pytest.mark.parametrize("share", [2, 0.25, 1.6])
def test_short_windows_in_a_share_of_the_steps(tokenizer, share):
    """Equally many in every sequence of a step, so that a batch can be stacked."""
    sequences = LongContextDataset(
        documents(5000), tokenizer, 64, 60, short=share, short_length=32, batch=3
    )
    counts = [len(sequences[i].get("short_ids", ())) for i in range(60)]
    steps = [counts[i : i + 3] for i in range(0, 60, 3)]
    assert all(len(set(step)) == 1 for step in steps)
    assert sum(counts) == 60 * share
    assert set(counts) <= {int(share), int(share) + 1}
    if share == 2:
        assert set(counts) == {2}


def test_too_little_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"42 tokens; .* 64:"):
        LongContextDataset(documents(40), tokenizer, 64, 1)
