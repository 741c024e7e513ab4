"""Which ramp the fast search begins from: a walk over two numbers of turns."""

from collections.abc import Generator

# YaRN's: what turns more than 32 times stays, what turns less than once is interpolated in full.
_FIRST = (32.0, 1.0)
# What the two numbers are multiplied by, round by round: one way while it helps, or the other.
_ROUNDS = (((4, 1), (1 / 4, 1)), ((2, 1), (1 / 2, 1)), ((1, 1 / 2), (1, 2)))


def walk() -> Generator[tuple[float, float], float, None]:
    """Pairs to try (turns that stay, turns that are interpolated in full).

    Is sent the loss of each, infinity where there is none. The first number differs most from model
    to model (4 and 256 were best), so that it comes first and in the largest steps.
    """
    best = _FIRST
    least = yield best
    for ways in _ROUNDS:
        for fast, slow in ways:
            before = best
            while best[1] * slow < best[0] * fast:
                there = best[0] * fast, best[1] * slow
                loss = yield there
                if loss >= least:
                    break
                best, least = there, loss
            if best != before:
                break
