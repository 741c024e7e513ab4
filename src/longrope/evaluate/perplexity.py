"""Perplexity of documents at a length, and which of two rescales is better."""

import dataclasses
import hashlib
import itertools
from collections.abc import MutableMapping, Sequence

import numpy as np

from longrope.data.windows import TokenDocument, require_length, with_bos
from longrope.evaluate.statistics import ratio_standard_error
from longrope.layerwise.forward import LongForward
from longrope.units import check_lengths


@dataclasses.dataclass(frozen=True)
class Scores:
    """Loss of every token, in nats: per document, shape (windows, length); NaN is unscored.

    A loss that is NaN in the model counts as infinite: it must not look unscored.
    """

    length: int
    documents: tuple[np.ndarray, ...]

    def tail(self, first: int) -> "Scores":
        """Only the tokens at positions from ``first`` on (beyond the original length)."""
        return Scores(self.length, tuple(losses[:, first:] for losses in self.documents))

    @property
    def tokens(self) -> int:
        return int(self._counts().sum())

    @property
    def windows(self) -> int:
        return sum(len(losses) for losses in self.documents)

    @property
    def mean(self) -> float:
        """Mean loss in nats per token, summed over all tokens."""
        return float(self._sums().sum() / self._counts().sum())

    @property
    def perplexity(self) -> float:
        with np.errstate(over="ignore"):
            return float(np.exp(self.mean))

    @property
    def standard_error(self) -> float | None:
        """Of the perplexity, over documents; None for a single document."""
        error = ratio_standard_error(self._sums(), self._counts())
        return None if error is None else self.perplexity * error

    def by_position(self, buckets: int = 32) -> list[tuple[int, int, float]]:
        """(first position, end, perplexity) of equal buckets: where a model breaks."""
        losses = np.concatenate(self.documents)
        edges = np.linspace(0, losses.shape[1], min(buckets, losses.shape[1]) + 1).astype(int)
        result = []
        for first, end in itertools.pairwise(edges):
            part = losses[:, first:end]
            if not np.isnan(part).all():
                result.append((int(first), int(end), float(np.exp(np.nanmean(part)))))
        return result

    def _sums(self) -> np.ndarray:
        return np.array([np.nansum(losses, dtype=np.float64) for losses in self.documents])

    def _counts(self) -> np.ndarray:
        return np.array([(~np.isnan(losses)).sum() for losses in self.documents])


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean loss of one rescale less that of another on the same tokens, in nats per token."""

    mean: float
    standard_error: float | None

    @property
    def better(self) -> bool:
        """Lower by more than twice the standard error of the paired difference."""
        return self.standard_error is not None and self.mean < -2 * self.standard_error


def paired_difference(a: Scores, b: Scores) -> Difference:
    """How much lower (negative) ``a`` is than ``b``, paired by document."""
    counts = a._counts()
    assert np.array_equal(counts, b._counts()), "scores of different tokens cannot be paired"
    with np.errstate(invalid="ignore"):  # infinite less infinite: neither is better
        sums = a._sums() - b._sums()
    return Difference(float(sums.sum() / counts.sum()), ratio_standard_error(sums, counts))


def score(
    forward: LongForward,
    documents: Sequence[TokenDocument],
    length: int,
    *,
    bos: int | None,
    lengths: Sequence[int] = (),
    stride: int | None = None,
    tokens_per_document: int | None = None,
    known: MutableMapping[str, np.ndarray] | None = None,
) -> Scores:
    """Score documents in windows of ``length`` tokens, under the rescale that is installed.

    Every document is cut into consecutive whole windows from its start. With other
    ``lengths`` to compare with, it is first cut to a multiple of the longest, and
    tokens that begin a window of any of them are scored at none (unless a BOS
    precedes them), so that all lengths are scored on the same tokens. With a
    ``stride`` windows overlap: each starts ``stride`` tokens after the last and
    scores only what that one did not.

    ``tokens_per_document`` cuts every document to about so many tokens first. Documents that are
    ``known``, by the hash of their tokens, are not scored again; what is scored is added.

    Raises:
        ValueError: no document is long enough; lengths that do not tile the longest.
    """
    longest = max(length, *lengths) if lengths else length
    check_lengths([length, *lengths], stride)
    scored = []
    for document in require_length(documents, longest):
        tokens = min(len(document), tokens_per_document or len(document))
        ids = document.ids[: max(tokens // longest, 1) * longest]
        name = hashlib.sha256(ids.tobytes()).hexdigest()[:16]
        if known is not None and name in known:
            scored.append(known[name])
            continue
        starts = range(0, len(ids) - length + 1, stride or length)
        scores = _window_losses(forward, [ids[start : start + length] for start in starts], bos)
        if stride is not None:
            scores[1:, : length - stride] = np.nan
        elif bos is None:
            for other in lengths:
                scores[:, ::other] = np.nan
        if known is not None:
            known[name] = scores
        scored.append(scores)
    return Scores(length, tuple(scored))


def _window_losses(
    forward: LongForward, windows: Sequence[np.ndarray], bos: int | None
) -> np.ndarray:
    """Of every token, shape (windows, length); infinite where the model's is not finite."""
    losses = [
        np.nan_to_num(batch.double().numpy(), nan=np.inf, posinf=np.inf)
        for batch in forward.batches(np.stack([with_bos(ids, bos) for ids in windows]))
    ]
    # Without a BOS nothing predicts the first token of a window.
    first = np.full((len(windows), 1 if bos is None else 0), np.nan)
    return np.concatenate([first, np.concatenate(losses)], axis=1)
