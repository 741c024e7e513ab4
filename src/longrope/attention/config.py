"""What a model's config says of its shape, whatever names its family has for it."""

from typing import Any, NamedTuple

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer


class AttentionShape(NamedTuple):
    """Of the layers that see all tokens, where they differ.

    ``head_dim`` is the mean of a key's and a value's; ``layers`` are those that have keys;
    ``kv_numbers`` are a token's in one layer of each of their shapes; ``sliding_layers`` see the
    last ``sliding_window`` tokens alone.
    """

    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    kv_numbers: int
    sliding_layers: int
    sliding_window: int | None


def attention_shape(config: Any) -> AttentionShape:
    """Of a text model's config; state-space models have no heads."""
    each = getattr(config, "per_layer_config", None)
    kinds = set(getattr(config, "layer_types", None) or ()) if each is not None else set()
    full = _heads(each["full_attention"] if "full_attention" in kinds else config)  # type: ignore[index]
    shapes = {_heads(each[kind])[1:] for kind in kinds} or {full[1:]}  # type: ignore[index]
    held = sum(2 * kv_heads * head_dim for kv_heads, head_dim in shapes)
    return AttentionShape(*full, _layers_with_keys(config), held, *sliding_layers(config))


def _heads(config: Any) -> tuple[int, int, int]:
    """Heads of queries, of keys, and the mean of the numbers in a key and a value."""
    heads = getattr(config, "num_attention_heads", None) or 0
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    if getattr(config, "kv_lora_rank", None):  # RoPE turns a part of each key
        key = config.qk_nope_head_dim + config.qk_rope_head_dim
        head_dim = (key + config.v_head_dim) // 2
    return heads, kv_heads, head_dim


def _layers_with_keys(config: Any) -> int:
    """The others go on from a state of all tokens before (Qwen3-Next, LFM2)."""
    try:
        kinds = DynamicCache(config=config).layers
    except Exception:  # a config that transformers' own cache does not know
        kinds = []
    without = [kind for kind in kinds if isinstance(kind, LinearAttentionLayer)]
    with_both = [kind for kind in without if isinstance(kind, DynamicLayer)]
    return config.num_hidden_layers - len(without) + len(with_both)


def sliding_layers(config: Any) -> tuple[int, int | None]:
    """How many layers of a text model's config see only the last tokens, and how many tokens."""
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return 0, None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return config.num_hidden_layers, window
    layers = sum("sliding" in kind for kind in kinds)
    return layers, window if layers else None


def explicit_scores(config: Any) -> bool:
    """Whether transformers has no fused attention for a model of this config."""
    return config._attn_implementation == "eager"
