"""Which documents are searched on, trained on and evaluated on: never one for two of them."""

import dataclasses
import random
from typing import Any

from longrope.data.windows import (
    TokenDocument,
    Windows,
    bos_token,
    joined,
    load_documents,
    search_windows,
    unseen,
)
from longrope.pipeline.recipe import Recipe

# Of the documents given: this share of the tokens is searched on, and where no documents for
# evaluation are given, as much is held out.
_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Splits:
    """The documents of a run, by use."""

    search: tuple[TokenDocument, ...]
    training: tuple[TokenDocument, ...]
    evaluation: tuple[TokenDocument, ...]
    bos: int | None
    eos: int | None

    def search_windows(self, length: int, samples: int, seed: int) -> Windows:
        """Windows to search on; short documents are joined.

        Raises:
            ValueError: all documents together are too short.
        """
        documents = joined(self.search, length, self.bos, self.eos)
        return search_windows(documents, length, samples, seed, self.bos, spare_half=False)

    def evaluation_documents(self, length: int, count: int) -> list[TokenDocument]:
        """Up to ``count`` documents of at least ``length`` tokens, short ones joined."""
        return joined(self.evaluation, length, self.bos, self.eos)[:count]


def split_documents(tokenizer: Any, recipe: Recipe, target: int, trained: int | None) -> Splits:
    """Read the documents and share them out, by chance and by their texts, not their order.

    Raises:
        ValueError: too few documents, or none long enough for the target even when joined;
            says how many tokens there are and how many are needed.
    """
    documents = load_documents(tokenizer, recipe.data, field=recipe.field, held_out=False)
    if recipe.evaluation_data or not recipe.data:
        evaluation = load_documents(
            tokenizer, recipe.evaluation_data, field=recipe.field, held_out=True
        )
        documents = unseen(documents, [h for document in evaluation for h in document.sha256])
    else:
        evaluation = []
    remaining = sorted(documents, key=lambda document: document.sha256)
    random.Random(recipe.seed).shuffle(remaining)
    total = sum(map(len, remaining))
    least = max(target, round(_SHARE * total))
    if not evaluation:
        evaluation = _take(remaining, target, least, leave=2)
    search = _take(remaining, target, least, leave=1)
    for what, pool in (("search on", search), ("evaluate on", evaluation)):
        found = sum(map(len, pool))
        if found < target:
            raise ValueError(
                f"too few tokens to {what}: {found:,} in {len(pool)} documents, and one window "
                f"of the target needs {target:,} ({total:,} in all, and no document serves two "
                "purposes); give more with --data, or choose a shorter --target"
            )
    left = sum(map(len, remaining))
    if trained is not None and left < trained:
        raise ValueError(
            f"too few tokens are left to train on: {left:,} of {total:,}, and one piece needs "
            f"{trained:,}; the other documents are for search and evaluation; give more with --data"
        )
    bos, eos = bos_token(tokenizer), tokenizer.eos_token_id
    return Splits(tuple(search), tuple(remaining), tuple(evaluation), bos, eos)


def _take(
    documents: list[TokenDocument], needed: int, wanted: int, leave: int
) -> list[TokenDocument]:
    """Remove documents from the end until they hold the tokens wanted.

    Once they hold those that are needed, the last ``leave`` documents are left for others.
    """
    taken: list[TokenDocument] = []
    tokens = 0
    while documents and tokens < wanted and not (tokens >= needed and len(documents) <= leave):
        taken.append(documents.pop())
        tokens += len(taken[-1])
    return taken
