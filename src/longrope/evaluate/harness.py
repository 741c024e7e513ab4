"""A model under its factors as lm-eval asks models: through the long forward.

Imported only where lm-eval (the extra ``benchmarks``) is there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.model import TemplateLM

from longrope.evaluate.benchmarks import generation_settings
from longrope.forward import BATCH_TOKENS, Answer, Asked
from longrope.generate import stream
from longrope.model import LoadedModel
from longrope.progress import progress
from longrope.rope.install import installed
from longrope.rope.rescale import Rescale
from longrope.windows import bos_token


class HarnessModel(TemplateLM):
    """Answers lm-eval's requests.

    Args:
        choose: the rescale for a sequence of so many tokens, answer included.
        longest: tokens that the model is made for; what is longer loses its beginning.
        title: what the progress is of; empty shows none.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        choose: Callable[[int], Rescale],
        longest: int,
        chunk: int,
        title: str,
        hidden_device: str | None,
    ):
        super().__init__()
        self.loaded, self.choose, self.longest, self.title = loaded, choose, longest, title
        self.tokenizer = loaded.tokenizer
        self.forward = loaded.forward(chunk, hidden_device)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = bos_token(self.tokenizer)
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        special = True if add_special_tokens is None else add_special_tokens
        return self.tokenizer(string, add_special_tokens=special, verbose=False)["input_ids"]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        sequences = [
            ((context + answer)[-self.longest :], answer) for _, context, answer in requests
        ]
        found: dict[int, Answer] = {}
        with progress(
            self.title, len(requests), show=bool(self.title) and self.loaded.team.rank == 0
        ) as advance:
            for rescale, batch in self._batches(sequences):
                with installed(self.loaded.model, rescale):
                    answers = self._answers([sequences[index] for index in batch])
                found.update(zip(batch, answers, strict=True))
                advance(len(found), "")
        answers = [found[index] for index in range(len(requests))]
        return [(answer.log_likelihood, answer.greedy) for answer in answers]

    def _answers(self, sequences: Sequence[tuple[list[int], list[int]]]) -> list[Answer]:
        """Texts with their answers; answers of one token after the same text share a row."""
        rows: dict[tuple[int, ...], int] = {}
        asked = []
        for ids, answer in sequences:
            row = rows.setdefault(tuple(ids[:-1]), len(rows))
            asked.append(Asked(row, len(ids) - len(answer), answer))
        ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for ids, row in rows.items():
            ids_BT[row, : len(ids)] = torch.tensor(ids)
        return self.forward.answers(ids_BT, asked)

    def _batches(
        self, sequences: Sequence[tuple[list[int], list[int]]]
    ) -> Iterator[tuple[Rescale, list[int]]]:
        """Indices of sequences of like lengths under one rescale, and equal texts together."""
        lengths = [len(ids) for ids, _ in sequences]
        order = sorted(range(len(sequences)), key=lambda i: (lengths[i], sequences[i][0]))
        for rescale, group in groupby(order, key=lambda i: self.choose(lengths[i])):
            batch: list[int] = []
            for index in group:
                if batch and (len(batch) + 1) * lengths[index] > BATCH_TOKENS:
                    yield rescale, batch
                    batch = []
                batch.append(index)
            yield rescale, batch

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise AssertionError("tasks of this kind have no answers to compare, and are refused")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        found: list[str] = []
        with progress(
            self.title, len(requests), show=bool(self.title) and self.loaded.team.rank == 0
        ) as advance:
            for request in requests:
                found.append(self._generated(*request.args))
                advance(len(found), "")
        return found

    def _generated(self, context: str, asked: Mapping[str, Any]) -> str:
        """Greedy text up to the first of its stops."""
        how = generation_settings(asked)
        new = how["max_gen_toks"]
        prompt = self.tok_encode(context)[-(self.longest - new) :]
        tokens: list[int] = []
        text = ""
        for token in stream(
            self.loaded, self.choose, prompt, max_new_tokens=new, chunk=self.forward.chunk
        ):
            tokens.append(token)
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            stops = [text.find(stop) for stop in how["until"] if stop and stop in text]
            if stops:
                return text[: min(stops)]
        return text
