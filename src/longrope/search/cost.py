"""The cost of search evaluations, in forward passes."""

import dataclasses

from longrope.data.kinds import KINDS, TOKENS, VALIDATION_WINDOWS
from longrope.layerwise.backward import BACKWARD_ATTENTION, is_kept
from longrope.models.info import ModelInfo
from longrope.search.settings import EvolutionSearchConfig, GradientSearchConfig
from longrope.search.space import Request

# Candidates that a validation measures, in the middle.
_VALIDATED = 5


@dataclasses.dataclass(frozen=True)
class EvaluationCost:
    """The cost of a search request, in forward passes over all search windows.

    Attributes:
        windows: number of search windows.
        grad: cost of a gradient, in forward passes over the same windows.
        shares: share of each window in a forward pass over all; the same for each if not given.
    """

    windows: int = 1
    grad: float = 3.0
    shares: tuple[float, ...] = ()

    def of(self, request: Request) -> float:
        """Return the cost of a search request in forward passes over all windows."""
        if request.window is None:
            whole = 1.0
        else:
            whole = self.shares[request.window] if self.shares else 1.0 / self.windows
        return whole * (self.grad if request.grad else 1.0)


def window_passes(config: GradientSearchConfig | EvolutionSearchConfig, length: int) -> float:
    """Return the forward passes over single windows or prompts that a search takes, at most.

    Those of its validation are included.

    Args:
        length: tokens of a window; windows of other kinds of text may be shorter.
    """
    kinds = len(KINDS) if length <= TOKENS else min(1, len(KINDS) * TOKENS / length)
    others = kinds if config.transfer == "regularise" else 0
    passes = config.forwards * (config.windows + others + config.passkey_prompts)
    if config.transfer != "none":
        passes += _VALIDATED * (config.validation_windows + kinds * VALIDATION_WINDOWS)
    return passes


def gradient_cost(info: ModelInfo, length: int, chunk_size: int) -> float:
    """Return the cost of one search gradient, in forward passes over the same sequence, by FLOPs.

    The weights are frozen: each product with weights is computed once forward and once backward.
    Offloaded weights and sequence parallelism do not change the cost, so histories stay the same.
    """
    linear, attention = info.forward_flops(length)
    again = 0.0
    if not is_kept(info.layers, info.hidden_size, length, -(-length // chunk_size)):
        # All layers are recomputed once; QKV projections and recurrent layers a second time.
        inputs = info.hidden_size * (info.heads + 2 * info.kv_heads) * info.head_dim
        again = 1 + 2 * info.attention_layers * inputs * length / linear
        again += 1 - info.attention_layers / info.layers
    work = (2 + again) * linear + (1 + BACKWARD_ATTENTION) * attention
    return work / (linear + attention)
