"""Split documents into disjoint sets for search, training and evaluation."""

import dataclasses
import logging
import random
from collections.abc import Sequence
from typing import Any

from longrope.data.encoding import bos_tokens
from longrope.data.windows import (
    MOST_SPANS,
    TokenDocument,
    Windows,
    cut_into_spans,
    exclude_documents,
    join_short_documents,
    load_documents,
    search_windows,
)
from longrope.pipeline.recipe import Recipe

# Share of the tokens for search, and as much for evaluation where no evaluation data is given.
_SHARE = 0.25

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Splits:
    """Disjoint splits of the documents, for search, training and evaluation.

    ``other`` is text of another kind, for evaluation only; it may be empty.
    """

    search: tuple[TokenDocument, ...]
    training: tuple[TokenDocument, ...]
    evaluation: tuple[TokenDocument, ...]
    other: tuple[TokenDocument, ...]
    bos: Sequence[int]
    eos: int | None

    def search_windows(self, length: int, samples: int, seed: int, validation: int = 0) -> Windows:
        """Cut search and validation windows from the search split; short documents are joined.

        Raises:
            ValueError: all documents together are shorter than ``length``.
        """
        documents = join_short_documents(self.search, length, self.bos, self.eos)
        return search_windows(
            documents,
            length,
            samples,
            seed,
            self.bos,
            validation=validation,
            spare_half=False,
        )

    def evaluation_documents(self, length: int, count: int) -> list[TokenDocument]:
        """Return up to ``count`` long documents of the evaluation split; short ones are joined.

        Each has at least ``length`` tokens.
        """
        return join_short_documents(self.evaluation, length, self.bos, self.eos)[:count]

    def other_document(self, lengths: Sequence[int]) -> tuple[list[TokenDocument], list[int]]:
        """Return a document of the other text, and the lengths that it can be scored at.

        They are the longest of ``lengths`` that it holds, and those that divide it.
        """
        total = sum(map(len, self.other))
        shortest = min(lengths)
        held = [n for n in lengths if n <= total and n % shortest == 0]
        if not held:
            return [], []
        longest = max(held)
        documents = join_short_documents(self.other, longest, self.bos, self.eos)
        return documents[:1], [length for length in held if longest % length == 0]


def split_documents(tokenizer: Any, recipe: Recipe, target: int, trained: int | None) -> Splits:
    """Read the documents and split them for search, training and evaluation.

    The split is random, and does not depend on the order of the documents.

    Raises:
        ValueError: too few documents or tokens; names how many there are and are needed.
    """
    documents = load_documents(tokenizer, recipe.data, recipe.field)
    if recipe.eval_data:
        evaluation = load_documents(tokenizer, recipe.eval_data, recipe.field)
        documents = exclude_documents(
            documents, [h for document in evaluation for h in document.sha256]
        )
        if not documents:
            raise ValueError(
                "all documents of `data` are in `eval_data` too, and no text serves two purposes: "
                "leave out `eval_data`, or give other documents"
            )
    else:
        evaluation = []
    purposes = 1 + (trained is not None) + (not evaluation)
    documents = _enough_documents(documents, purposes, target)
    remaining = sorted(documents, key=lambda document: document.sha256)
    random.Random(recipe.seed).shuffle(remaining)
    total = sum(map(len, remaining))
    least = max(target, round(_SHARE * total))
    if not evaluation:
        evaluation = _take(remaining, target, least, leave=2)
    search = _take(remaining, target, least, leave=1)
    for what, pool in (("search", search), ("evaluate", evaluation)):
        found = sum(map(len, pool))
        if found < target:
            raise ValueError(
                f"too few tokens to {what} on: one window of the target needs {target:,}, and "
                f"{found:,} of {total:,} can be used for it, because no text serves two purposes; "
                "give more `data`, or a smaller `target`"
            )
    left = sum(map(len, remaining))
    if trained is not None and left < trained:
        raise ValueError(
            f"too few tokens left to train on: {left:,} of {total:,}, but one sequence needs "
            f"{trained:,}; the other documents are used for search and evaluation; give more `data`"
        )
    bos, eos = bos_tokens(tokenizer), tokenizer.eos_token_id
    sources = recipe.other_sources
    other = load_documents(tokenizer, sources, recipe.field) if sources else []
    other = exclude_documents(
        other, [h for pool in (search, remaining) for d in pool for h in d.sha256]
    )
    return Splits(tuple(search), tuple(remaining), tuple(evaluation), tuple(other), bos, eos)


def _enough_documents(
    documents: list[TokenDocument], purposes: int, target: int
) -> list[TokenDocument]:
    """Cut long documents into spans where there are fewer documents than purposes.

    Windows of different spans are ``target`` tokens apart.
    """
    if len(documents) >= purposes:
        return documents
    found: list[TokenDocument] = []
    for document in documents:
        spans = min(MOST_SPANS, (len(document) + target) // (2 * target))
        if spans < purposes:
            found.append(document)
            continue
        found += cut_into_spans(document, spans, target)
        log.warning(
            "%s is cut into %d spans, %s tokens apart: search, training and evaluation use "
            "different ones",
            document.name,
            spans,
            f"{target:,}",
        )
    return found


def _take(
    documents: list[TokenDocument], needed: int, wanted: int, leave: int
) -> list[TokenDocument]:
    """Take the documents of one split from the end of a list, until they hold ``wanted`` tokens.

    Once they hold ``needed`` tokens, the last ``leave`` documents are not taken.
    """
    taken: list[TokenDocument] = []
    tokens = 0
    while documents and tokens < wanted and not (tokens >= needed and len(documents) <= leave):
        taken.append(documents.pop())
        tokens += len(taken[-1])
    return taken
