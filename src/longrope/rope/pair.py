"""The pair of rescales of an extended model: one for short sequences, one for long ones."""

from dataclasses import dataclass

from longrope.rope.rescale import Rescale


@dataclass(frozen=True)
class RescalePair:
    """The two rescales of an extended model: ``short`` up to its length, ``long`` beyond.

    Args:
        short_attention_factor: attention factor of ``short`` where only longrope applies it;
            a checkpoint has one attention factor for both rescales.
    """

    short: Rescale
    long: Rescale
    short_attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.short_attention_factor is not None:
            short = self.short.replace(attention_factor=self.short_attention_factor)
            object.__setattr__(self, "short", short)

    @property
    def recovery_length(self) -> int:
        """Longest sequence, in tokens with generated ones, that uses the pair's ``short``."""
        return self.short.max_position_embeddings

    def choose(self, tokens: int) -> Rescale:
        """Choose the short or long rescale of the pair for a sequence of ``tokens`` tokens."""
        return self.short if tokens <= self.recovery_length else self.long
