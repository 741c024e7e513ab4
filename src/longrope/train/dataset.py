"""What a model is fine-tuned on: pieces of one length, each a function of its number."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from longrope.data.prompts import passkey_prompt, question_tokens, require_room
from longrope.data.windows import TokenDocument, bos_token, pack


class LongContextDataset(Dataset):
    """Pieces of ``length`` tokens, cut from documents joined in an order by chance.

    Each stands between BOS and EOS, as in the paper (section 4.1), where the tokenizer
    has them. Number i is the same whoever asks and whenever, so that training resumes, and
    is shared out over processes, without a state. When the text is used up it begins anew,
    in another order.

    A share of the pieces may be passkey prompts of a length by chance (ours: a model of a
    few million parameters forgets what it is not shown), followed by text. The answer then
    weighs as much in the loss as ``answer_share`` of the piece's tokens, so that it is not lost
    among more of them. With ``short`` a piece brings
    so many windows of ``short_length`` tokens, which are trained under the original RoPE
    (LongRoPE2's mixed-context training, so that the short context is not lost). Of a fraction
    its share of the steps, of ``batch`` pieces each, have one more; in a step that has none the
    piece has the whole weight.

    Args:
        count: pieces in all: steps × batch.
        reach: a length beyond the pieces' that their positions may span, by a jump at a place and
            of a size by chance (PoSE, arXiv 2309.10400, with two chunks).

    Raises:
        ValueError: the documents hold not even one piece.
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
        bos, eos = bos_token(tokenizer), tokenizer.eos_token_id
        self._shortest = question_tokens(tokenizer)
        if passkey_share:
            require_room("finetune.passkey_share", tokenizer, length)
        self._start = [] if bos is None else [bos]
        self._end = [] if eos is None else [eos]
        self._room = length - len(self._start) - len(self._end)
        ordered = sorted(documents, key=lambda document: document.sha256)
        random.Random(seed).shuffle(ordered)
        self._stream = pack(ordered, bos, eos).ids if ordered else np.zeros(0, np.int32)
        self.distinct = len(self._stream) // self._room
        if not self.distinct:
            raise ValueError(
                f"too few tokens to train on: {len(self._stream):,}, and one piece needs "
                f"{length:,}; give more text with --data"
            )

    @property
    def epochs(self) -> float:
        """How many times the text is used."""
        return self.count * (1 - self.passkey_share) / self.distinct

    def __len__(self) -> int:
        return self.count

    @property
    def bring_windows(self) -> bool:
        """Whether any piece has short windows."""
        return short_windows(self.count // self.batch, self.short) > 0

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """``input_ids`` and ``weights`` (of predicting each token), shape (length,).

        With short windows also ``short_ids``, shape (windows, short_length); with a reach
        ``places``, the positions of the tokens, shape (length,).
        """
        rng = random.Random(f"{self.seed} {number}")
        text = self._text(number)
        weights = np.ones(self.length, dtype=np.float32)
        end = self.length  # of where positions may jump
        if rng.random() < self.passkey_share:
            longest = rng.randint(self._shortest, self.length)
            prompt = passkey_prompt(self.tokenizer, longest, rng.random(), rng)
            answer = slice(len(prompt.ids) - prompt.answer_tokens, len(prompt.ids))
            weights[answer] = max(1.0, self.answer_share * self.length / prompt.answer_tokens)
            end = answer.start  # in half of these pieces the jump parts the key from its question
            text = np.concatenate([prompt.ids, text[len(self._start) :]])[: self.length]
        piece = {
            "input_ids": torch.from_numpy(text.astype(np.int64)),
            "weights": torch.from_numpy(weights),
        }
        if self.reach > self.length:
            places = torch.arange(self.length)
            places[rng.randrange(1, end) :] += rng.randint(0, self.reach - self.length)
            piece["places"] = places
        step = number // self.batch
        if short := short_windows(step + 1, self.short) - short_windows(step, self.short):
            windows = np.stack([self._window(rng) for _ in range(short)])
            piece["short_ids"] = torch.from_numpy(windows.astype(np.int64))
        return piece

    def _window(self, rng: random.Random) -> np.ndarray:
        tokens = self.short_length - len(self._start)
        first = rng.randrange(len(self._stream) - tokens + 1)
        return np.concatenate([self._start, self._stream[first : first + tokens]])

    def _text(self, number: int) -> np.ndarray:
        epoch, index = divmod(number, self.distinct)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.distinct)
        # Another cut in every epoch, where the text leaves room for it.
        spare = len(self._stream) - self.distinct * self._room
        shift = random.Random(f"{self.seed} {epoch}").randint(0, spare)
        start = shift + int(order[index]) * self._room
        piece = self._stream[start : start + self._room]
        return np.concatenate([self._start, piece, self._end]).astype(np.int32)


def short_windows(steps: int, beside: float) -> int:
    """Windows in the first so many steps, of ``beside`` each, in whole ones."""
    return int(steps * beside + 0.5)
