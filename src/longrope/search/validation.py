"""Validate a search's result on windows that it has not seen, and fall back where it does harm.

A result is accepted if it beats the best start by more than the standard error, and is worse than
a published method on no kind of text. Otherwise two thirds of the way from the best published
method to the result are tried, then one third, then the best start, then that method.
"""

import dataclasses
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from longrope.rope.rescale import Rescale

# The kind of the windows that come from the searched text.
OWN = "own"
# Worse than a published method by more than this and two standard errors is harm, in nats.
_HARM, _ERRORS = 0.01, 2.0
# Shares of the way from the best published method to the result, in ln λ.
_SHARES = (2 / 3, 1 / 3)
# Published methods to measure: the best on the search windows.
_MEASURED = 2

Measure = Callable[[Rescale], Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Validation:
    """Validation of a search: what was chosen, and the loss of each candidate on unseen windows.

    Attributes:
        kinds: kind of text of each window; "own" is the searched text.
        losses: by candidate, of each window in nats per token.
        start: the best start or published method that does no harm.
        chosen: the accepted candidate.
        gain: loss of ``start`` less that of ``chosen``; own text and the other kinds count half.
        gain_standard_error: of the gain, paired over the windows; None if it cannot be told.
        gains: the gain on each kind of text.
    """

    kinds: tuple[str, ...]
    losses: dict[str, list[float]]
    start: str
    chosen: str
    gain: float
    gain_standard_error: float | None
    gains: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """Return what a search's provenance says of its validation."""
        return {
            "start": self.start,
            "gain": self.gain,
            "gain_standard_error": self.gain_standard_error,
            "gains": self.gains,
        }


def validate(
    measure: Measure,
    kinds: Sequence[str],
    result: Rescale,
    start: tuple[str, Rescale],
    published: Mapping[str, Rescale],
) -> tuple[Rescale, Validation]:
    """Return the factors to use after a search, and how they did on the validation windows.

    Args:
        measure: returns a rescale's loss on each window.
        kinds: of the windows.
        start: name and factors of the best start.
        published: methods as published, to compare with; the best on the search windows first.
    """
    candidates = {start[0]: start[1], "result": result}
    for name, rescale in list(published.items())[:_MEASURED]:
        if not _same(rescale, start[1]):
            candidates[name if name not in candidates else f"published {name}"] = rescale
    references = [name for name in candidates if name != "result"]
    losses = {name: list(measure(rescale)) for name, rescale in candidates.items()}
    methods = [name for name in references if name != start[0]] or [start[0]]

    def harms(name: str) -> bool:
        return any(_is_worse(losses[name], losses[other], kinds) for other in methods)

    def mean(name: str) -> float:
        return _weighted(losses[name], kinds)

    def beats_best(name: str) -> bool:
        gain = np.subtract(losses[best], losses[name])
        return _weighted(gain, kinds) >= (_standard_error(gain, kinds) or 0.0)

    harmless = [name for name in references if not harms(name)]
    best = chosen = min(harmless or methods, key=mean)
    published_best = candidates[min(methods, key=mean)]
    for share in (1.0, *_SHARES, 0.0):
        name = {1.0: "result", 0.0: start[0]}.get(share, f"{share:.0%} of the way")
        if name not in candidates:
            candidates[name] = _between(published_best, result, share)
            losses[name] = list(measure(candidates[name]))
        if math.isfinite(mean(name)) and beats_best(name) and not harms(name):
            chosen = name
            break
    differences = np.subtract(losses[best], losses[chosen])
    return candidates[chosen], Validation(
        kinds=tuple(kinds),
        losses=losses,
        start=best,
        chosen=chosen,
        gain=_weighted(differences, kinds),
        gain_standard_error=_standard_error(differences, kinds),
        gains=_by_kind(losses[best], losses[chosen], kinds),
    )


def rescale_key(rescale: Rescale) -> str:
    """Return a hash of what a rescale applies, by which its validation losses are stored."""
    return hashlib.sha256(json.dumps(rescale.applied(), sort_keys=True).encode()).hexdigest()


def _same(a: Rescale, b: Rescale) -> bool:
    return a.attention_factor == b.attention_factor and np.allclose(a.factors, b.factors, rtol=0.01)


def _between(published: Rescale, result: Rescale, share: float) -> Rescale:
    """Return the validation candidate at a share of the way to the result, in ln λ."""
    weights = np.array([1 - share, share])
    logs = weights @ np.log([published.factors, result.factors])
    factor = float(weights @ [published.attention_factor, result.attention_factor])
    return result.replace(factors=tuple(np.exp(logs).tolist()), attention_factor=factor)


def _weights(kinds: Sequence[str]) -> np.ndarray:
    """Return the weight of each validation window: own text and all other kinds count half."""
    own = np.array([kind == OWN for kind in kinds])
    weights = np.where(own, 1 / max(own.sum(), 1), 1 / max((~own).sum(), 1))
    return weights / weights.sum()


def _weighted(values: Sequence[float] | np.ndarray, kinds: Sequence[str]) -> float:
    return float(np.dot(_weights(kinds), values))


def _standard_error(differences: np.ndarray, kinds: Sequence[str]) -> float | None:
    """Return the standard error of a weighted validation difference; None for single windows."""
    weights, own = _weights(kinds), np.array([kind == OWN for kind in kinds])
    variance = 0.0
    for part in (own, ~own):
        if part.sum() == 1:
            return None
        if part.any():
            variance += float((weights[part] ** 2).sum()) * statistics.variance(differences[part])
    return math.sqrt(variance)


def _is_worse(losses: Sequence[float], others: Sequence[float], kinds: Sequence[str]) -> bool:
    """Whether a validation candidate does harm to any kind of text, against another one.

    The standard error of a kind comes from the spread within all kinds, since each has few windows.
    """
    means, named = _by_kind(losses, others, kinds), np.array(kinds)
    differences = np.subtract(losses, others)
    spread = sum(float(((differences[named == k] - mean) ** 2).sum()) for k, mean in means.items())
    deviation = math.sqrt(spread / max(1, len(kinds) - len(means)))
    return any(
        mean > max(_HARM, _ERRORS * deviation / math.sqrt((named == kind).sum()))
        for kind, mean in means.items()
    )


def _by_kind(
    losses: Sequence[float], others: Sequence[float], kinds: Sequence[str]
) -> dict[str, float]:
    """Return the mean validation difference of each kind of text."""
    differences = np.subtract(losses, others)
    named = np.array(kinds)
    return {kind: float(differences[named == kind].mean()) for kind in dict.fromkeys(kinds)}
