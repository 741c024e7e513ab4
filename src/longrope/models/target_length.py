"""The target length of an extension, and the rescale a search starts from."""

from longrope.models.info import ModelInfo
from longrope.rope.rescale import Rescale, default_attention_factor
from longrope.units import parse_length


def starting_point(info: ModelInfo, target: int, attention_factor: float | None) -> Rescale:
    """Return the starting rescale for a target, which all candidates of a first search multiply.

    Args:
        target: length in tokens.
        attention_factor: for every candidate; by default √(1 + ln s / ln L), multiplied by that
            of scaling which is kept.
    """
    start = info.rescale("none", target)
    if attention_factor is None:
        original = start.original_max_position_embeddings
        attention_factor = default_attention_factor(original, target) * start.attention_factor
    return start.replace(attention_factor=attention_factor)


def parse_extension(text: str, info: ModelInfo) -> int:
    """Parse the target length of a model's extension, in tokens.

    Args:
        text: such as ``131072``, ``128k`` or ``8x``.

    Raises:
        ValueError: not a length, or not beyond the model's original length.
    """
    original = info.original_max_position_embeddings
    assert original is not None
    target = parse_length(text, original)
    if target <= original:
        raise ValueError(
            f"target is {target:,} tokens; this model handles {original:,} already "
            f"({info.original_read_from}), so give a larger target such as 8x"
        )
    return target
