"""Configurations of perplexity, retrieval and benchmark measurements. Imports no torch."""

from pydantic import Field, model_validator

from longrope.base_config import Config
from longrope.units import check_lengths


class PerplexityConfig(Config):
    """Configuration of a perplexity measurement."""

    lengths: tuple[int, ...] = Field(
        description="All window lengths, in tokens, that are compared on the same tokens."
    )
    stride: int | None = Field(
        default=None,
        description="Tokens between the starts of overlapping windows; by default they do not "
        "overlap.",
    )
    tokens_per_document: int | None = Field(
        default=None, ge=1, description="Tokens to score per document; by default all."
    )

    @model_validator(mode="after")
    def _check(self) -> "PerplexityConfig":
        check_lengths(self.lengths, self.stride)
        return self


class RetrievalConfig(Config):
    """Configuration of a passkey or needle measurement."""

    trials: int = Field(default=20, ge=1, description="Prompts per length, with stratified depths.")
    digits: int = Field(default=5, ge=1, description="Digits of the hidden number.")
    seed: int = Field(default=0, description="Random seed of the hidden numbers and depths.")


class BenchmarkConfig(Config):
    """Configuration of benchmark measurements with lm-eval."""

    tasks: tuple[str, ...] = Field(
        default=(),
        description="lm-eval tasks or groups, such as arc_challenge, mmlu, niah_single_1 (RULER).",
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        description="Questions per task at most, over all parts of a group; by default all.",
    )
    num_fewshot: int | None = Field(
        default=None,
        ge=0,
        description="Few-shot examples before each question; by default the paper's.",
    )
    datasets: str | None = Field(
        default=None,
        description="Directory with local copies of the hub's datasets; by default the hub.",
    )
    ruler_lengths: tuple[int, ...] = Field(
        default=(), description="Tokens of the texts that RULER generates."
    )
