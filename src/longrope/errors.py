"""The error of a lost rank, and one-line messages from errors and values."""

from typing import Any


class RankLost(BaseException):
    """Error of a lost rank: another process of the run died.

    Not an ``Exception``: the launcher's signal can arrive in any code, also within another
    library, and no ``except Exception`` may take it for an error of that code.
    """


def first_line(error: BaseException) -> str:
    """Return a one-line message from an error: its first line, with the second after a colon."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])


def shortened(value: Any, longest: int = 60) -> str:
    """Return a value for a message: in one line, and with its end cut off if it is long."""
    try:
        text = " ".join((value if isinstance(value, str) and longest > 60 else repr(value)).split())
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= longest else text[: longest - 1] + "…"


def printable(text: str) -> str:
    """Return a message for a terminal: control characters, as file names can have, are escaped."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
