"""The first lines of a report: what was gained, at which length it holds, what it cost."""

import itertools
from collections.abc import Iterator
from typing import Any

from longrope.evaluate.statistics import retrieval_totals, wilson
from longrope.labels import RESULT, fine_tuned
from longrope.units import duration, number, ratio

# A perplexity rises by more than this between two lengths, or above the original's: named.
TOLERANCE = 0.05
# Retrieval holds at a length if at least this share of the answers is correct.
RETRIEVED = 0.8
# Recovery counts as harmful if it raises perplexity by more than this factor.
_WORSE = 1.005


def headline(results: dict[str, Any]) -> list[str]:
    """Return the summary lines of a run, the most important first."""
    perplexity = _by_method(results["perplexity"])
    return [
        _answer(results, perplexity),
        *_separated(results, perplexity),
        *_jumps(results, perplexity[RESULT], ""),
        *_passkeys(results),
        *_short_context(results),
        *_other_text(results),
        _cost(results),
    ]


def holds_to(results: dict[str, Any]) -> tuple[int | None, str]:
    """Return the largest length up to which the result holds, and what fails beyond.

    It holds where perplexity is at most 5% above that at the original length, on the same tokens,
    and at least 80% of the passkeys are found. At the original length the lower perplexity counts,
    the original model's or the result's: training that lowers perplexity at every length has
    learned the text, which does not make the context longer. Passkeys do not count if the original
    model does not find them either.

    Returns:
        The length in tokens, None if there is none; and a sentence, empty if nothing fails.
    """
    perplexity = _by_method(results["perplexity"])
    base = _base(results, perplexity)
    asked = _found(results, RESULT) if _finds_passkeys(results) else {}
    reached = None
    for length, value in sorted(perplexity[RESULT].items()):
        correct, trials = asked.get(length, (1, 1))
        if value is None or base is None or value > base * (1 + TOLERANCE):
            return reached, f"At {length:,} tokens perplexity is {ratio(value, base)}."
        if correct < RETRIEVED * trials:
            return reached, f"At {length:,} tokens {correct} of {trials} passkeys are found."
        reached = length
    return reached, ""


def _base(results: dict[str, Any], perplexity: dict[str, dict[int, float | None]]) -> float | None:
    """Return the perplexity at the original length that the longer ones are judged by."""
    length = results["original_length"]
    values = perplexity["none"][length], perplexity[RESULT].get(length)
    return min((value for value in values if value is not None), default=None)


def _found(results: dict[str, Any], method: str) -> dict[int, tuple[int, int]]:
    """Return the found passkeys and the trials of a method by length."""
    return retrieval_totals(row for row in results["passkey"] if row["method"] == method)


def _finds_passkeys(results: dict[str, Any]) -> bool:
    """Return whether the original model finds passkeys at its own length, as far as known."""
    correct, trials = _found(results, "none").get(results["original_length"], (1, 1))
    return correct >= RETRIEVED * trials


def _by_method(rows: list[dict[str, Any]]) -> dict[str, dict[int, float | None]]:
    found: dict[str, dict[int, float | None]] = {}
    for row in rows:
        found.setdefault(row["method"], {})[row["length"]] = row["perplexity"]
    return found


def _answer(results: dict[str, Any], perplexity: dict[str, dict[int, float | None]]) -> str:
    original, target = results["original_length"], results["target"]
    own, base = perplexity[RESULT][target], perplexity["none"][original]
    reached, failing = holds_to(results)
    asked = bool(_found(results, RESULT)) and _finds_passkeys(results)
    whose = "the extended model's" if _base(results, perplexity) != base else "the original model's"
    means = f"perplexity at most {TOLERANCE:.0%} above {whose} at {original:,}"
    means += f", at least {RETRIEVED:.0%} of the passkeys found" if asked else ""
    holds = f"holds up to {reached:,} tokens" if reached else "holds at no length"
    unscaled = ""
    if target in perplexity["none"]:
        unscaled = f"; {number(perplexity['none'][target])} without any scaling"
    return (
        f"The extension to {target:,} tokens {holds} ({means}). {failing}{' ' * bool(failing)}"
        f"Perplexity at {target:,}: "
        f"{number(own)}, {ratio(own, base)} against {number(base)} of the original model at "
        f"{original:,}{unscaled}."
    )


def _separated(
    results: dict[str, Any], perplexity: dict[str, dict[int, float | None]]
) -> Iterator[str]:
    """Yield what factors and training contribute: the same weights under known factors."""
    target = results["target"]
    parts = [
        f"{name} {number(perplexity[label][target])}"
        for name, label in (
            ("the fine-tuned weights under YaRN's factors", fine_tuned("yarn")),
            ("under NTK's", fine_tuned("ntk")),
            ("the original weights under YaRN's", "yarn"),
        )
        if target in perplexity.get(label, {})
    ]
    if parts:
        yield f"For comparison at {target:,}: {', '.join(parts)}."


def _jumps(results: dict[str, Any], own: dict[int, float | None], where: str) -> Iterator[str]:
    """Yield the jumps of perplexity between neighbouring lengths, with the likely cause."""
    for (before, low), (after, high) in itertools.pairwise(sorted(own.items())):
        if low and (high is None or high > low * (1 + TOLERANCE)):
            yield (
                f"Perplexity jumps by {ratio(high, low)} from {before:,} to {after:,} "
                f"tokens{where}: {_cause(results, before, after)}."
            )


def _cause(results: dict[str, Any], before: int, after: int) -> str:
    trained, boundary = results["trained_length"], results["recovery_length"]
    if any(stage["name"] == "final-finetune" for stage in results["stages"]):
        trained = results["target"]  # its positions reach beyond that
    if before <= boundary < after:
        return (
            f"the long factors apply beyond {boundary:,} tokens, and they fit these lengths less "
            "well than the short ones"
        )
    if trained is None:
        return "nothing was trained, and the factors alone do not reach so far; fine-tune"
    if after > trained:
        return f"it lies beyond the {trained:,} tokens that were trained for"
    return "the training did not suffice there; train longer"


def _passkeys(results: dict[str, Any]) -> Iterator[str]:
    asked = _found(results, RESULT)
    if not asked:
        return
    length, worst = min(asked.items(), key=lambda x: (x[1][0] / x[1][1], -x[0]))
    low, high = wilson(*worst)
    correct, trials = (sum(pair[i] for pair in asked.values()) for i in (0, 1))
    line = (
        f"Passkeys: {correct} of {trials} found; fewest at {length:,} tokens, {worst[0]} of "
        f"{worst[1]} (95% interval {low:.0%} to {high:.0%})."
    )
    if not _finds_passkeys(results):
        before, of = _found(results, "none")[results["original_length"]]
        line += (
            f" The original model finds {before} of {of} at {results['original_length']:,}, so "
            "they say nothing about the extension."
        )
    yield line


def _short_context(results: dict[str, Any]) -> Iterator[str]:
    for row in results["recovery"][:1]:
        pair = row["with"], row["without"]
        harmed = None not in pair and pair[0] > _WORSE * pair[1]
        harm = ": the recovered short factors are worse on this text" if harmed else ""
        yield (
            f"Short context: perplexity at {row['length']:,} tokens is {number(row['with'])}, "
            f"{ratio(row['with'], row['original'])} against the original model "
            f"({number(row['without'])} without recovery{harm})."
        )


def _other_text(results: dict[str, Any]) -> Iterator[str]:
    perplexity = _by_method(results.get("other_perplexity", []))
    if not perplexity:
        return
    own, base = perplexity[RESULT], perplexity["none"][results["original_length"]]
    longest = max(own)
    yield (
        f"As a check on text of another kind ({_listed(results['other_documents'])}), perplexity "
        f"at {longest:,} tokens is {number(own[longest])}, {ratio(own[longest], base)} against the "
        f"original model at {results['original_length']:,}."
    )
    yield from _jumps(results, own, f" on {_listed(results['other_documents'])}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _cost(results: dict[str, Any]) -> str:
    stages = results["stages"]
    seconds = sum(stage["seconds"] for stage in stages)
    trained = sum(s["tokens"] for s in stages if s["name"].endswith("finetune"))
    training = f", {trained:,} tokens of training" if trained else ", no training"
    return f"Cost: {duration(seconds)} without the evaluation{training}."
