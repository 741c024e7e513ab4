"""The cost of one gradient evaluation, in forward passes."""

from longrope.layerwise.backward import BACKWARD_ATTENTION, is_kept
from longrope.models.info import ModelInfo


def forwards(info: ModelInfo, length: int, chunk_size: int) -> float:
    """Return the cost of one gradient in forward passes of the same sequence, by FLOPs.

    The weights are frozen: each product with weights is computed once forward and once backward.
    Offloaded weights and sequence parallelism do not change the cost, so histories stay the same.
    """
    linear, attention = info.forward_flops(length)
    again = 0.0
    if not is_kept(info.layers, info.hidden_size, length, -(-length // chunk_size)):
        # The layers once more; once more again what makes queries, keys and values, or states.
        inputs = info.hidden_size * (info.heads + 2 * info.kv_heads) * info.head_dim
        again = 1 + 2 * info.attention_layers * inputs * length / linear
        again += 1 - info.attention_layers / info.layers
    work = (2 + again) * linear + (1 + BACKWARD_ATTENTION) * attention
    return work / (linear + attention)
