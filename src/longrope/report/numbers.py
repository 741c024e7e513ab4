"""How the report writes its numbers."""

import math


def number(value: float | None) -> str:
    """A perplexity, three digits of a large one."""
    if value is None or not math.isfinite(value):
        return "∞"
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def percent(share: float) -> str:
    """A difference, such as ``-1.0%``."""
    return f"{share:+.1%}"


def ratio(value: float | None, base: float | None) -> str:
    """How far above, such as ``+1.3%``; perplexities that overflowed are None."""
    if value is None or base is None or not math.isfinite(value):
        return "∞"
    return percent(value / base - 1)
