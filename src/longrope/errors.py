"""The error of a lost rank, and one-line messages from other libraries' errors."""


class RankLost(BaseException):
    """Error of a lost rank: another process of the run died.

    Not an ``Exception``: the launcher's signal can arrive in any code, also within another
    library, and no ``except Exception`` may take it for an error of that code.
    """


def first_line(error: BaseException) -> str:
    """Return a one-line message from an error: its first line, with the second after a colon."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])
