"""Which ramp the fast search begins from: a walk over two numbers of turns."""

import math
from collections.abc import Generator

# YaRN's: what turns more than 32 times stays, what turns less than once is interpolated in full.
_FIRST = (32.0, 1.0)
# By what the two numbers are multiplied, round by round: either way, and on while it gets better.
_MOVES = (((4, 1), (1 / 4, 1)), ((2, 1), (1 / 2, 1)), ((1, 1 / 2), (1, 2)))


def walk() -> Generator[tuple[float, float], float, None]:
    """Pairs to try (turns that stay, turns that are interpolated in full), sent the loss of each.

    The first number differs most from model to model (4 and 256 were best), so that it comes first
    and in the largest steps. NaN and infinity lose.
    """
    best = _FIRST
    least = _finite((yield best))
    for moves in _MOVES:
        for fast, slow in moves:
            moved = False
            while (there := (best[0] * fast, best[1] * slow))[1] < there[0]:
                loss = _finite((yield there))
                if loss >= least:
                    break
                best, least, moved = there, loss, True
            if moved:
                break


def _finite(loss: float) -> float:
    return round(loss, 6) if math.isfinite(loss) else math.inf
