"""Search settings: one pydantic model per algorithm, with every default and bound."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from longrope.base_config import Config

# Forward passes for comparing the starts, and for the best of them on all windows.
LEAST_BUDGET = 4


class _SearchConfig(Config):
    """The search settings that both algorithms share."""

    windows: int = Field(default=5, ge=1, description="Number of search windows.")
    transfer: Literal["none", "validate", "regularise"] = Field(
        default="regularise",
        description="Protection of other text: validate refuses factors that are worse on unseen "
        "windows, regularise also searches on a window each of prose, code, dialogue and manuals.",
    )
    validation_windows: int = Field(
        default=4, ge=0, description="Number of unseen windows of the text to validate on."
    )
    passkey_prompts: int = Field(
        default=0,
        ge=0,
        description="Number of passkey prompts whose loss is added to that of the windows.",
    )
    max_factor: float | None = Field(
        default=None,
        ge=1,
        allow_inf_nan=False,
        description="Largest rescale factor; 1.25 times the scale if not given.",
    )

    @property
    def own_validation_windows(self) -> int:
        """Number of a search's validation windows of the text itself."""
        return 0 if self.transfer == "none" else self.validation_windows


class GradientSearchConfig(_SearchConfig):
    """Settings of the gradient search."""

    algorithm: Literal["gradient"] = Field(
        default="gradient",
        description="Search algorithm: gradient, or evolution (Algorithm 1 of the LongRoPE paper).",
    )
    budget: int = Field(
        default=18,
        ge=LEAST_BUDGET,
        description="Maximum number of forward passes over all windows.",
    )
    step_size: float = Field(
        default=0.06,
        gt=0,
        allow_inf_nan=False,
        description="Largest step in ln λ (tripled for a single window).",
    )
    windows_per_step: int = Field(
        default=1, ge=1, description="Number of windows per gradient step; processes share them."
    )

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the course of a gradient search."""
        return self.model_dump()

    @property
    def forwards(self) -> int:
        """Budget in the gradient search's settings, in forward passes over all windows."""
        return self.budget

    @property
    def max_forwards(self) -> int:
        """Largest number of forward passes that the gradient search's settings allow."""
        return self.budget


class EvolutionSearchConfig(_SearchConfig):
    """Settings of the evolution search (Algorithm 1); the paper's defaults up to 256k tokens."""

    algorithm: Literal["evolution"] = Field(
        default="evolution", description=GradientSearchConfig.model_fields["algorithm"].description
    )
    budget: int | None = Field(
        default=None, ge=1, description=GradientSearchConfig.model_fields["budget"].description
    )
    patience: int | None = Field(
        default=None, ge=1, description="Stop after this many generations without a lower loss."
    )
    population: int = Field(default=64, ge=1, description="Size of the first generation (P).")
    mutations: int = Field(default=16, ge=0, description="Mutants per generation (N1).")
    crossovers: int = Field(default=16, ge=0, description="Crossovers per generation (N2).")
    mutation_probability: float = Field(
        default=0.3, gt=0, le=1, description="Probability that a mutation redraws a factor (p)."
    )
    iterations: int = Field(
        default=40, ge=1, description="Number of generations after the first (T)."
    )
    parents: int = Field(
        default=32, ge=1, description="Number of best candidates used as parents (k)."
    )

    @model_validator(mode="after")
    def _check(self) -> "EvolutionSearchConfig":
        if self.mutations + self.crossovers < 1:
            raise ValueError("mutations and crossovers are both 0; one of them must be positive")
        if self.budget is not None and self.budget > self.max_forwards:
            raise ValueError(
                f"budget is {self.budget}, but all generations take {self.max_forwards} forward "
                "passes: raise iterations or population"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the course of an evolution search.

        Budget and patience only decide when to stop: a finished search can resume with larger ones.
        """
        return self.model_dump(exclude={"budget", "patience"})

    @property
    def forwards(self) -> int:
        """Budget in the evolution search's settings, in forward passes over all windows."""
        return self.budget or self.max_forwards

    @property
    def max_forwards(self) -> int:
        """Forward passes of all generations under these settings; 1,344 with the defaults."""
        return self.population + self.iterations * (self.mutations + self.crossovers)


def _algorithm(content: Any) -> Any:
    if isinstance(content, Mapping):
        return content.get("algorithm", "gradient")
    return getattr(content, "algorithm", None)


SearchConfig = Annotated[
    Annotated[GradientSearchConfig, Tag("gradient")]
    | Annotated[EvolutionSearchConfig, Tag("evolution")],
    Discriminator(_algorithm),
]
SEARCH_CONFIGS: dict[str, type[GradientSearchConfig] | type[EvolutionSearchConfig]] = {
    "gradient": GradientSearchConfig,
    "evolution": EvolutionSearchConfig,
}
_ADAPTER: TypeAdapter[GradientSearchConfig | EvolutionSearchConfig] = TypeAdapter(SearchConfig)


def make_search_config(
    options: Mapping[str, Any], name: Callable[[str], str] = str
) -> GradientSearchConfig | EvolutionSearchConfig:
    """Return the search settings with these options; the algorithm is gradient if not given.

    Args:
        name: returns the caller's spelling of an option, for error messages.

    Raises:
        ValueError: an unknown option, a value out of range, or an option of the other algorithm.
    """
    try:
        return _ADAPTER.validate_python(options)
    except ValidationError as error:
        raise ValueError(describe_error(error.errors()[0], name)) from None


def describe_error(error: Any, name: Callable[[str], str] = str, others: Sequence[str] = ()) -> str:
    """Return one line for a validation error of search settings.

    Args:
        error: one of ``ValidationError.errors()``.
        name: returns the caller's spelling of an option.
        others: names of further options that the caller knows.
    """
    if error["type"] == "union_tag_invalid":
        algorithms = ", ".join(SEARCH_CONFIGS)
        return f"{name('algorithm')} is {error['ctx']['tag']!r}; choose one of {algorithms}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    option, value = str(error["loc"][-1]), error["input"]
    if error["type"] == "extra_forbidden":
        algorithm = error["loc"][-2]
        for other, model in SEARCH_CONFIGS.items():
            if option in model.model_fields:
                return (
                    f"{name(option)} is {value!r}: it is an option of {name('algorithm')} {other}, "
                    f"and this search uses {algorithm}"
                )
        known = ", ".join([*others, *SEARCH_CONFIGS[algorithm].model_fields])
        return f"no key {name(option)!r}; there are {known}"
    return f"{name(option)} is {value!r}: {error['msg'].lower()}"
