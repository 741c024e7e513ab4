"""Settings of the search algorithms."""

import dataclasses
import math

ALGORITHMS = ("gradient", "evolution")
# Forward equivalents for the starts, and the best of them on all windows.
LEAST_BUDGET = 4


@dataclasses.dataclass(frozen=True)
class GradientSettings:
    """Settings of the descent.

    Args:
        forwards: the budget in forward equivalents; the steps follow from it.
        rate: of the largest step in ln λ; three times that with one window.
        step_windows: how many windows a step takes the slope on; processes share them.

    Raises:
        ValueError: a budget below 4, a count below 1, or a rate that is not positive.
    """

    forwards: int = 27
    rate: float = 0.06
    step_windows: int = 1

    def __post_init__(self) -> None:
        if self.forwards < LEAST_BUDGET:
            raise ValueError(
                f"--budget is {self.forwards}; it must be at least {LEAST_BUDGET}, which comparing "
                "the starts takes"
            )
        if not 0 < self.rate < math.inf:
            raise ValueError(f"--rate is {self.rate}; it must be positive and finite")
        if self.step_windows < 1:
            raise ValueError(f"--step-windows is {self.step_windows}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class EvolutionSettings:
    """Algorithm 1's settings; the defaults are the paper's for targets up to 256k.

    Raises:
        ValueError: a count below 1 or a probability outside (0, 1].
    """

    population: int = 64
    mutations: int = 16
    crossovers: int = 16
    probability: float = 0.3
    iterations: int = 40
    parents: int = 32

    def __post_init__(self) -> None:
        for name in ("population", "iterations", "parents"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("mutations", "crossovers"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must not be negative")
        if self.mutations + self.crossovers < 1:
            raise ValueError("--mutations and --crossovers are both 0; one must be positive")
        if not 0 < self.probability <= 1:
            raise ValueError(f"--probability is {self.probability}; it must be in (0, 1]")

    @property
    def forwards(self) -> int:
        """The whole budget, in forwards of all windows: 1,344 with the paper's settings."""
        return self.population + self.iterations * (self.mutations + self.crossovers)


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """How a search goes about it, whatever it searches.

    ``passkeys``: questions asked of every candidate beside the ``samples`` windows. ``budget`` is
    in forward equivalents (all of them once), ``rate`` and ``step_windows`` the fast algorithm's,
    ``settings`` and ``patience`` the paper's.

    Raises:
        ValueError: a count below 1, no such algorithm, or an option of the other one.
    """

    samples: int = 5
    passkeys: int = 0
    algorithm: str = "gradient"
    budget: int | None = None
    patience: int | None = None
    seed: int = 0
    chunk: int | None = None
    offload_activations: str | None = None
    rate: float = GradientSettings.rate
    step_windows: int = GradientSettings.step_windows
    settings: EvolutionSettings = dataclasses.field(default_factory=EvolutionSettings)

    def __post_init__(self) -> None:
        for name in ("samples", "budget", "patience", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 1")
        if self.passkeys < 0:
            raise ValueError(f"--passkeys is {self.passkeys}; it must not be negative")
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"--algorithm {self.algorithm}: there is {', '.join(ALGORITHMS)}")
        if self.patience is not None and self.algorithm == "gradient":
            raise ValueError(
                f"--patience is {self.patience}; the fast search has no generations to wait for: "
                "leave it out, or give --algorithm evolution"
            )
        if self.algorithm == "gradient" and self.settings != EvolutionSettings():
            changed = [
                f"--{field.name} {value}"
                for field in dataclasses.fields(EvolutionSettings)
                if (value := getattr(self.settings, field.name)) != field.default
            ]
            raise ValueError(
                f"{', '.join(changed)}: settings of --algorithm evolution; this is fast"
            )
        of_fast = (GradientSettings.rate, GradientSettings.step_windows)
        if self.algorithm == "evolution" and (self.rate, self.step_windows) != of_fast:
            raise ValueError(
                f"--rate {self.rate}, --step-windows {self.step_windows}: settings of --algorithm "
                "fast; this is paper"
            )
        most = self.of_algorithm().forwards
        if self.budget is not None and self.budget > most:
            raise ValueError(
                f"--budget is {self.budget}, and so many generations end after {most}: raise "
                "--iterations or --population"
            )

    def of_algorithm(self) -> EvolutionSettings | GradientSettings:
        """The settings of the algorithm chosen."""
        if self.algorithm == "evolution":
            return self.settings
        return GradientSettings(
            self.budget or GradientSettings.forwards, self.rate, self.step_windows
        )

    @property
    def forwards(self) -> int:
        """The budget in forward equivalents: all windows and questions once are one."""
        return self.budget or self.of_algorithm().forwards
