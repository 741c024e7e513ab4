"""lm-eval model that runs an extended model through the long forward.

This module imports lm-eval, which the extra ``benchmarks`` installs.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM

from longrope.compat import cache_name
from longrope.data.encoding import bos_tokens, check_ids, encode, encode_prompt
from longrope.evaluate.lm_eval_tasks import generation_settings
from longrope.inference.generate import generate_tokens
from longrope.layerwise.forward import BATCH_TOKENS, Continuation
from longrope.layerwise.output_head import ContinuationScore, score_continuation
from longrope.models.load import LoadedModel
from longrope.progress import progress
from longrope.rope.apply import rescaled
from longrope.rope.rescale import Rescale

# A longer context gets its own batch, and one forward pass for all its answers.
_LONG = BATCH_TOKENS // 8


class HarnessModel(TemplateLM):
    """lm-eval model that answers each request under the rescale for its length.

    Args:
        choose: returns the rescale for a sequence of so many tokens, answer included.
        longest: context window in tokens; longer sequences are cut at the start.
        title: title of the progress bar; empty shows none.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        choose: Callable[[int], Rescale],
        longest: int,
        title: str,
    ):
        super().__init__()
        self.loaded, self.choose, self.longest, self.title = loaded, choose, longest, title
        self.tokenizer = loaded.tokenizer
        self.forward = loaded.forward()

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return next(iter(bos_tokens(self.tokenizer)), self.eot_token_id)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is False:
            return encode(self.tokenizer, [string])[0].tolist()
        return encode_prompt(self.tokenizer, string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        sequences = [
            ((context + answer)[-self.longest :], answer) for _, context, answer in requests
        ]
        for ids, _ in sequences:
            check_ids(np.array(ids), self.forward.vocabulary, "a question of the benchmark")
        found: dict[int, ContinuationScore] = {}
        with progress(
            self.title, len(requests), show=bool(self.title) and self.loaded.group.rank == 0
        ) as advance:
            for rescale, batch in self._batches(sequences):
                with rescaled(self.loaded.model, rescale):
                    answers = self._answers([sequences[index] for index in batch])
                found.update(zip(batch, answers, strict=True))
                advance(len(found), "")
        answers = [found[index] for index in range(len(requests))]
        return [(answer.log_likelihood, answer.greedy) for answer in answers]

    def _answers(self, sequences: Sequence[tuple[list[int], list[int]]]) -> list[ContinuationScore]:
        """Score the answers of lm-eval requests in one batch; equal inputs share a row."""
        rows: dict[tuple[int, ...], int] = {}
        asked = []
        for ids, answer in sequences:
            row = rows.setdefault(tuple(ids[:-1]), len(rows))
            asked.append(Continuation(row, len(ids) - len(answer), answer))
        # One prefill serves all answers to one context, except in three cases: a
        # sequence-parallel group works on rows together, offloaded weights would be streamed
        # again for each answer, and a recurrent state cannot be cropped.
        info = self.loaded.info
        alone = self.loaded.group.size == 1 and not self.forward.offloaded
        alone = alone and info.attention_layers == info.layers
        if alone and len(rows) > 1 and len({_context(*sequence) for sequence in sequences}) == 1:
            text = list(_context(*sequences[0]))
            # The KV cache of all layers may not fit on a GPU.
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                return self._after(text, [answer for _, answer in sequences])
            torch.cuda.empty_cache()
        ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for ids, row in rows.items():
            ids_BT[row, : len(ids)] = torch.tensor(ids)
        return self.forward.score(ids_BT, asked)

    @torch.inference_mode()
    def _after(self, text: list[int], answers: Sequence[list[int]]) -> list[ContinuationScore]:
        """Score lm-eval answers to one context with one prefill; each crops the KV cache."""
        model, device = self.loaded.model, self.forward.device
        first_1V, cache = self.forward.prefill(torch.tensor([text]))
        found = []
        for answer in answers:
            logits_TV = first_1V
            if before := len(answer) - 1:  # answer tokens that precede another
                positions = torch.arange(len(text), len(text) + before, device=device)
                later = model(
                    input_ids=torch.tensor([answer[:-1]], device=device),
                    position_ids=positions[None],
                    **{cache_name(model): cache},
                )
                logits_TV = torch.cat([first_1V, later.logits[0]])
                cache.crop(-before)
            found.append(score_continuation(logits_TV, answer))
        return found

    def _batches(
        self, sequences: Sequence[tuple[list[int], list[int]]]
    ) -> Iterator[tuple[Rescale, list[int]]]:
        """Yield lm-eval requests (indices) under one rescale: one long context, or many short."""
        lengths, texts = [len(ids) for ids, _ in sequences], [_context(*s) for s in sequences]
        order = sorted(range(len(sequences)), key=lambda i: lengths[i])
        for rescale, group in groupby(order, key=lambda i: self.choose(lengths[i])):
            batch: list[int] = []
            ordered = sorted(group, key=lambda i: (len(texts[i]), texts[i]))
            for text, alike in groupby(ordered, key=lambda i: texts[i]):
                together = [*batch, *alike]
                allocate = BATCH_TOKENS // max(lengths[i] for i in together)
                if batch and (len(text) > _LONG or len(together) > allocate):
                    yield rescale, batch
                    together = together[len(batch) :]
                batch = together
            yield rescale, batch

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise AssertionError(
            "tasks with rolling log-likelihoods are refused: they have no answers to compare"
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        found: list[str] = []
        with progress(
            self.title, len(requests), show=bool(self.title) and self.loaded.group.rank == 0
        ) as advance:
            for request in requests:
                found.append(self._generated(*request.args))
                advance(len(found), "")
        return found

    def _generated(self, context: str, asked: Mapping[str, Any]) -> str:
        """Return the greedy answer to an lm-eval request, up to the first stop sequence."""
        how = generation_settings(asked)
        new = how["max_gen_toks"]
        prompt = self.tok_encode(context)[-(self.longest - new) :]
        tokens: list[int] = []
        text = ""
        for token in generate_tokens(
            self.loaded, self.choose, prompt, max_new_tokens=new, forward=self.forward
        ):
            tokens.append(token)
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            stops = [text.find(stop) for stop in how["until"] if stop and stop in text]
            if stops:
                return text[: min(stops)]
        return text


def _context(ids: list[int], answer: list[int]) -> tuple[int, ...]:
    """Return the tokens of an lm-eval request before its answer."""
    return tuple(ids[: len(ids) - len(answer)])
