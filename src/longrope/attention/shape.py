"""Read head counts, sliding windows and cache sizes from a model's config."""

from typing import Any, NamedTuple

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer


class AttentionShape(NamedTuple):
    """Attention dimensions from a model's config: heads, layers and sliding windows.

    Where layers differ, the values describe the full-attention layers.

    Attributes:
        heads: number of query heads.
        kv_heads: number of key heads.
        head_dim: mean of the key and value dimensions of a head.
        layers: number of layers with keys and values.
        kv_numbers: keys and values per token in one layer, summed over the distinct layer shapes.
        sliding_layers: number of layers with a sliding window.
        sliding_window: tokens that these layers see, or None.
    """

    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    kv_numbers: int
    sliding_layers: int
    sliding_window: int | None


def attention_shape(config: Any) -> AttentionShape:
    """Read the attention dimensions from a text config; state-space models have no heads."""
    each = getattr(config, "per_layer_config", None)
    kinds = set(getattr(config, "layer_types", None) or ()) if each is not None else set()
    full = _heads(each["full_attention"] if "full_attention" in kinds else config)  # type: ignore[index]
    shapes = {_heads(each[kind])[1:] for kind in kinds} or {full[1:]}  # type: ignore[index]
    held = sum(2 * kv_heads * head_dim for kv_heads, head_dim in shapes)
    return AttentionShape(*full, _layers_with_keys(config), held, *sliding_layers(config))


def _heads(config: Any) -> tuple[int, int, int]:
    """Read the numbers of query and key heads, and the mean head dimension, from a config."""
    heads = getattr(config, "num_attention_heads", None) or 0
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    if getattr(config, "kv_lora_rank", None):  # RoPE rotates a part of each key
        key = config.qk_nope_head_dim + config.qk_rope_head_dim
        head_dim = (key + config.v_head_dim) // 2
    return heads, kv_heads, head_dim


def _layers_with_keys(config: Any) -> int:
    """Count the layers with attention in a config; others have recurrent states (Qwen3-Next)."""
    try:
        kinds = DynamicCache(config=config).layers
    except Exception:  # transformers' cache does not support this config
        kinds = []
    without = [kind for kind in kinds if isinstance(kind, LinearAttentionLayer)]
    with_both = [kind for kind in without if isinstance(kind, DynamicLayer)]
    return config.num_hidden_layers - len(without) + len(with_both)


def sliding_layers(config: Any) -> tuple[int, int | None]:
    """Read the number of sliding-window layers and their window, or None, from a config."""
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return 0, None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return config.num_hidden_layers, window
    layers = sum("sliding" in kind for kind in kinds)
    return layers, window if layers else None


def explicit_scores(config: Any) -> bool:
    """Whether transformers has only eager attention for a model's config, no fused kernel."""
    return config._attn_implementation == "eager"
