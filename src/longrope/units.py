"""Parse and format lengths, sizes, durations and ratios."""

import math
from collections.abc import Sequence

LONGEST = 10**12  # tokens


def number(value: float | None) -> str:
    """Format a perplexity: two decimals, from 1,000 on three digits; ∞ if not finite."""
    if value is None or not math.isfinite(value):
        return "∞"
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def percent(share: float) -> str:
    """Format a signed percentage, such as ``-1.0%``."""
    return f"{share:+.1%}"


def ratio(value: float | None, base: float | None) -> str:
    """Format how far a value is above its base, such as ``+1.3%``.

    Perplexities that overflowed are None.
    """
    if value is None or base is None or not math.isfinite(value):
        return "∞"
    return percent(value / base - 1)


def gigabytes(size: float) -> str:
    """Format a size in bytes, such as ``1.4 GB``."""
    return f"{size / 1e9:,.1f} GB" if size < 1e11 else f"{size / 1e9:,.0f} GB"


def check_lengths(lengths: Sequence[int], stride: int | None = None) -> None:
    """Check lengths in tokens: each divides the longest, and a stride needs a single one.

    Raises:
        ValueError: a length of one token, or that does not divide the longest; a stride with
            several lengths (they would score other tokens), or out of range.
    """
    longest = max(lengths)
    if min(lengths) < 2:
        raise ValueError(
            f"lengths is {', '.join(map(str, lengths))}; a window needs at least 2 tokens (write "
            "thousands without a comma)"
        )
    for length in lengths:
        if longest % length:
            raise ValueError(
                f"lengths is {', '.join(map(str, lengths))}; {length} does not divide {longest}. "
                "Lengths are compared on the same tokens, so each must divide the longest"
            )
    if stride is not None and len(set(lengths)) > 1:
        raise ValueError(f"stride is {stride}; it requires one length, not {len(set(lengths))}")
    if stride is not None and not 1 <= stride <= longest:
        raise ValueError(
            f"stride is {stride}; it must be at least 1 and at most the length, {longest}"
        )


def duration(seconds: float) -> str:
    """Format a duration, such as ``1 h 05 min`` or ``12 days``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02d} min" if hours < 72 else f"{hours / 24:,.0f} days"


def parse_length(text: str | int, original: int | None = None) -> int:
    """Parse a length in tokens: ``131072`` (also as a number), ``128k`` (× 1,024), ``2m``, ``8x``.

    ``8x`` requires an original length.

    Raises:
        ValueError: none of these forms.
    """
    number, unit = str(text).strip().lower(), 1
    if number.endswith(("k", "m")):
        number, unit = number[:-1], 1024 if number[-1] == "k" else 1024**2
    elif number.endswith("x") and original is not None:
        number, unit = number[:-1], original
    try:
        length = float(number) * unit
    except ValueError:
        length = 0.0
    if not 0 < length < LONGEST or round(length) < 1:
        forms = "131072 or 128k" if original is None else "131072, 128k or 8x"
        raise ValueError(f"invalid length {text!r}: use e.g. {forms}")
    if abs(length - round(length)) > 1e-6:  # 1.1 times 1,000 is a little more than 1,100
        raise ValueError(f"invalid length {text!r}: {length:,.1f} tokens is not a whole number")
    return round(length)
