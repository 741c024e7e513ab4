"""The error of a lost rank, and one-line messages from other libraries' errors."""


class RankLost(BaseException):
    """Another process of the run died.

    Not an ``Exception``: the launcher's signal can arrive in any code, also within another
    library, and no ``except Exception`` may take it for an error of that code.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an error, and the second where the first ends in a colon."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])
