"""One-line messages from the errors of other libraries."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error, and the second where the first ends in a colon."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])
