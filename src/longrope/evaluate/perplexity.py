"""Perplexity of documents in windows of one length, and paired differences."""

import dataclasses
import hashlib
import itertools
from collections.abc import MutableMapping, Sequence

import numpy as np

from longrope.data.windows import TokenDocument, require_length, with_bos
from longrope.evaluate.statistics import ratio_standard_error
from longrope.layerwise.forward import LongForward
from longrope.units import check_lengths

# Blocks of a single document, for a standard error.
_BLOCKS = 16


@dataclasses.dataclass(frozen=True)
class Scores:
    """Perplexity scores: the loss of every token in the windows of several documents.

    Args:
        length: tokens per window.
        documents: losses in nats, one array of shape (windows, length) per document. NaN marks
            a token that is not scored; a NaN from the model counts as infinite.
    """

    length: int
    documents: tuple[np.ndarray, ...]

    def tail(self, first: int) -> "Scores":
        """Return the perplexity scores of tokens at positions from ``first`` on."""
        return Scores(self.length, tuple(losses[:, first:] for losses in self.documents))

    @property
    def tokens(self) -> int:
        """Number of tokens that count in the perplexity."""
        return int(self._counts().sum())

    @property
    def windows(self) -> int:
        return sum(len(losses) for losses in self.documents)

    @property
    def mean(self) -> float:
        """Logarithm of the perplexity: mean loss over all scored tokens, in nats per token."""
        return float(self._sums().sum() / self._counts().sum())

    @property
    def perplexity(self) -> float:
        """Perplexity of all documents: the exponential of the mean loss."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.mean))

    @property
    def standard_error(self) -> float | None:
        """Standard error of the perplexity over documents, or over blocks of a single one.

        Blocks of one document are less independent than documents. None if it is undefined.
        """
        error = ratio_standard_error(self._sums(), self._counts())
        return None if error is None else self.perplexity * error

    def by_position(self, buckets: int = 32) -> list[tuple[int, int, float]]:
        """Return the perplexity by position: (first position, end, perplexity) of equal ranges."""
        losses = np.concatenate(self.documents)
        edges = np.linspace(0, losses.shape[1], min(buckets, losses.shape[1]) + 1).astype(int)
        result = []
        for first, end in itertools.pairwise(edges):
            part = losses[:, first:end]
            if not np.isnan(part).all():
                result.append((int(first), int(end), float(np.exp(np.nanmean(part)))))
        return result

    def _units(self) -> list[np.ndarray]:
        """Return the losses of the units of a standard error: documents, or blocks of one.

        Blocks have the same tokens at every window length.
        """
        if len(self.documents) > 1:
            return [losses.ravel() for losses in self.documents]
        return np.array_split(np.concatenate(self.documents).ravel(), _BLOCKS)

    def _sums(self) -> np.ndarray:
        return np.array([np.nansum(losses, dtype=np.float64) for losses in self._units()])

    def _counts(self) -> np.ndarray:
        return np.array([(~np.isnan(losses)).sum() for losses in self._units()])


@dataclasses.dataclass(frozen=True)
class Difference:
    """Difference between two perplexity scores on the same tokens: mean loss, nats per token."""

    mean: float
    standard_error: float | None

    @property
    def better(self) -> bool | None:
        """Whether the first perplexity is lower; None within two standard errors."""
        if self.standard_error is None or abs(self.mean) <= 2 * self.standard_error:
            return None
        return self.mean < 0


def paired_difference(a: Scores, b: Scores) -> Difference:
    """Return the :class:`Difference` of perplexity scores ``a`` minus ``b``, paired by document.

    Of a single document, paired by blocks of it.
    """
    counts = a._counts()
    assert np.array_equal(counts, b._counts()), "cannot pair scores of different tokens"
    with np.errstate(invalid="ignore"):  # infinity minus infinity: neither is better
        sums = a._sums() - b._sums()
    return Difference(float(sums.sum() / counts.sum()), ratio_standard_error(sums, counts))


def score(
    forward: LongForward,
    documents: Sequence[TokenDocument],
    length: int,
    *,
    bos: Sequence[int],
    lengths: Sequence[int] = (),
    stride: int | None = None,
    tokens_per_document: int | None = None,
    known: MutableMapping[str, np.ndarray] | None = None,
) -> Scores:
    """Measure the perplexity of documents in windows of ``length`` tokens.

    The active rescale applies. Every document is cut into consecutive whole windows from its start.

    Args:
        bos: ids of the special tokens to put before every window. They count towards ``length``,
            so the last ``len(bos)`` tokens of a window are not scored. Without them, its first
            token is not.
        lengths: other lengths to score the same tokens at. A token that a window of any length
            leaves out is scored at none. Documents are cut to a multiple of the longest.
        stride: tokens between the starts of overlapping windows; each window scores only tokens
            that the one before did not.
        tokens_per_document: tokens scored of each document, about.
        known: losses by a hash of the document's tokens; documents in it are skipped, new ones
            are added.

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
            scores[1:, : max(0, length - stride - len(bos))] = np.nan
        else:
            for other in lengths:
                for place in range(other - len(bos), other) if bos else (0,):
                    scores[:, place::other] = np.nan
        if known is not None:
            known[name] = scores
        scored.append(scores)
    return Scores(length, tuple(scored))


def _window_losses(
    forward: LongForward, windows: Sequence[np.ndarray], bos: Sequence[int]
) -> np.ndarray:
    """Return the loss of every token for a perplexity, shape (windows, length).

    Non-finite losses are infinite.
    """
    inputs = [with_bos(ids[: len(ids) - len(bos)], bos) for ids in windows]
    losses = np.concatenate(
        [
            np.nan_to_num(batch.double().numpy(), nan=np.inf, posinf=np.inf)
            for batch in forward.batches(np.stack(inputs))
        ]
    )
    not_scored = np.full((len(windows), max(len(bos), 1)), np.nan)
    both = (losses[:, len(bos) - 1 :], not_scored) if bos else (not_scored, losses)
    return np.concatenate(both, axis=1)
