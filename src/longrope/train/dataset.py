"""Training sequences of one length, each a function of the seed and its index."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from longrope.data.encoding import bos_tokens
from longrope.data.prompts import passkey_prompt, question_tokens, require_room
from longrope.data.windows import TokenDocument, pack


class LongContextDataset(Dataset):
    """Dataset of training sequences of ``length`` tokens, cut from shuffled, joined documents.

    Each is put between BOS and EOS where the tokenizer has them, as in the paper (section 4.1).
    Item i depends only on the seed and i, so resuming and sharding need no sampler state. After the
    last token the text is reused in another order.

    A share of the sequences can be passkey prompts of random length followed by text, as small
    models forget what they are not shown. The answer then weighs as much as ``answer_share`` of the
    tokens. With ``short``, sequences come with windows of ``short_length`` tokens, trained under
    the original RoPE to keep short-context quality (LongRoPE2's mixed-context training). A
    fractional ``short`` gives that share of the steps one window more per sequence.

    Args:
        documents: the text.
        tokenizer: of the model.
        length: tokens per sequence.
        count: number of sequences: steps × batch.
        reach: span of position ids in tokens; beyond ``length``, a jump of random size at a random
            place is inserted (PoSE, arXiv 2309.10400, with two chunks).
        seed: random seed.
        passkey_share: share of passkey prompts.
        answer_share: weight of the passkey's answer, as a share of the sequence's tokens.
        short: short windows per sequence; may be a fraction.
        short_length: tokens per short window.
        batch: sequences per step.

    Raises:
        ValueError: the documents have fewer tokens than one sequence.
    """

    def __init__(
        self,
        documents: Sequence[TokenDocument],
        tokenizer: Any,
        length: int,
        count: int,
        *,
        reach: int = 0,
        seed: int = 0,
        passkey_share: float = 0.0,
        answer_share: float = 0.0,
        short: float = 0,
        short_length: int = 0,
        batch: int = 1,
    ):
        self.tokenizer, self.length, self.seed = tokenizer, length, seed
        self.count, self.reach = count, reach
        self.passkey_share, self.answer_share = passkey_share, answer_share
        self.short, self.short_length, self.batch = short, short_length, batch
        bos, eos = bos_tokens(tokenizer), tokenizer.eos_token_id
        self._shortest = question_tokens(tokenizer)
        if passkey_share:
            require_room("finetune.passkey_share", tokenizer, length)
        self._start = bos
        self._end = [] if eos is None else [eos]
        self._room = length - len(self._start) - len(self._end)
        ordered = sorted(documents, key=lambda document: document.sha256)
        random.Random(seed).shuffle(ordered)
        self._stream = pack(ordered, bos, eos).ids if ordered else np.zeros(0, np.int32)
        self.distinct = len(self._stream) // self._room
        if not self.distinct:
            raise ValueError(
                f"the training text has {len(self._stream):,} tokens; one sequence needs "
                f"{length:,}: use more text"
            )

    @property
    def epochs(self) -> float:
        """Epochs over the dataset's text, passkey prompts not counted."""
        return self.count * (1 - self.passkey_share) / self.distinct

    def __len__(self) -> int:
        return self.count

    @property
    def has_short_windows(self) -> bool:
        """Whether any training sequence comes with short windows."""
        return short_windows(self.count // self.batch, self.short) > 0

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Return training sequence ``number`` of the dataset.

        Returns:
            ``input_ids`` and ``weights`` (of each token's loss), shape (length,). With short
            windows also ``short_ids``, shape (windows, short_length); with a reach also
            ``rotary_positions``, shape (length,).
        """
        rng = random.Random(f"{self.seed} {number}")
        text = self._text(number)
        weights = np.ones(self.length, dtype=np.float32)
        end = self.length  # positions jump before this token, if at all
        if rng.random() < self.passkey_share:
            longest = rng.randint(self._shortest, self.length)
            prompt = passkey_prompt(self.tokenizer, longest, rng.random(), rng)
            answer = slice(len(prompt.ids) - prompt.answer_tokens, len(prompt.ids))
            weights[answer] = max(1.0, self.answer_share * self.length / prompt.answer_tokens)
            end = answer.start  # in about half of these the jump separates key and question
            text = np.concatenate([prompt.ids, text[len(self._start) :]])[: self.length]
        sequence = {
            "input_ids": torch.from_numpy(text.astype(np.int64)),
            "weights": torch.from_numpy(weights),
        }
        if self.reach > self.length:
            rotary_positions = torch.arange(self.length)
            rotary_positions[rng.randrange(1, end) :] += rng.randint(0, self.reach - self.length)
            sequence["rotary_positions"] = rotary_positions
        step = number // self.batch
        if short := short_windows(step + 1, self.short) - short_windows(step, self.short):
            windows = np.stack([self._window(rng) for _ in range(short)])
            sequence["short_ids"] = torch.from_numpy(windows.astype(np.int64))
        return sequence

    def _window(self, rng: random.Random) -> np.ndarray:
        """Draw a short window of the training text, with BOS."""
        tokens = self.short_length - len(self._start)
        first = rng.randrange(len(self._stream) - tokens + 1)
        return np.concatenate([self._start, self._stream[first : first + tokens]])

    def _text(self, number: int) -> np.ndarray:
        """Return the text of training sequence ``number``, with BOS and EOS."""
        epoch, index = divmod(number, self.distinct)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.distinct)
        # Each epoch cuts the text at another offset, if there are spare tokens.
        spare = len(self._stream) - self.distinct * self._room
        shift = random.Random(f"{self.seed} {epoch}").randint(0, spare)
        start = shift + int(order[index]) * self._room
        sequence = self._stream[start : start + self._room]
        return np.concatenate([self._start, sequence, self._end]).astype(np.int32)


def short_windows(steps: int, beside: float) -> int:
    """Count the dataset's short windows in the first ``steps`` steps, for one sequence per step.

    ``beside`` is their mean number per step.
    """
    return int(steps * beside + 0.5)
