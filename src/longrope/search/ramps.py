"""The ramps that a gradient search starts from: a walk over two numbers of rotations."""

from collections.abc import Generator

# YaRN's: unscaled above 32 rotations, interpolated in full below one.
_FIRST = (32.0, 1.0)
# Multipliers of the pair, by round: one direction while it helps; the other if it does not.
_ROUNDS = (((4, 1), (1 / 4, 1)), ((2, 1), (1 / 2, 1)), ((1, 1 / 2), (1, 2)))


def walk_ramps() -> Generator[tuple[float, float], float, None]:
    """Walk over ramps: yield pairs of rotations (unscaled above, interpolated in full below).

    Send the loss of each pair, infinity if not finite. The first number differs most from model
    to model (4 and 256 were best), so it comes first and in the largest steps.
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
