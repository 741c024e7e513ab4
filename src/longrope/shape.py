"""What a model's config says of its shape, whatever names its family has for it."""

from typing import Any, NamedTuple

from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer


class AttentionShape(NamedTuple):
    """``head_dim`` is the mean of a key's and a value's; ``layers`` are those that have keys."""

    heads: int
    kv_heads: int
    head_dim: int
    layers: int


def attention_shape(config: Any) -> AttentionShape:
    """Of a text model's config; state-space models have no heads."""
    kinds = getattr(config, "layer_types", None) or ()
    each = getattr(config, "per_layer_config", None)
    # Of layers that differ (Gemma 4) those that see all.
    own = each["full_attention"] if each is not None and "full_attention" in kinds else config
    heads = getattr(own, "num_attention_heads", None) or 0
    kv_heads = getattr(own, "num_key_value_heads", None) or heads
    head_dim = getattr(own, "head_dim", None) or config.hidden_size // max(heads, 1)
    if getattr(config, "kv_lora_rank", None):  # RoPE turns a part of each key
        key = config.qk_nope_head_dim + config.qk_rope_head_dim
        head_dim = (key + config.v_head_dim) // 2
    return AttentionShape(heads, kv_heads, head_dim, _layers_with_keys(config))


def _layers_with_keys(config: Any) -> int:
    """The others go on from a state of all tokens before (Qwen3-Next, LFM2)."""
    try:
        kinds = DynamicCache(config=config).layers
    except Exception:  # a config that transformers' own cache does not know
        kinds = []
    without = [kind for kind in kinds if isinstance(kind, LinearAttentionLayer)]
    with_both = [kind for kind in without if isinstance(kind, DynamicLayer)]
    return config.num_hidden_layers - len(without) + len(with_both)


def active_parameters(model: nn.Module, config: Any) -> int:
    """The parameters that one token is multiplied with: of experts those that it is sent to."""
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    total = sum(p.numel() for p in model.parameters())
    count = _first(config, "num_experts", "num_local_experts", "n_routed_experts")
    count = count or _first(config, "moe_num_experts")
    chosen = _first(config, "num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
    if not (experts and count and chosen):
        return total
    return total - experts + experts * min(chosen, count) // count


def _first(config: Any, *names: str) -> int | None:
    """The first of some fields that is a number; some families have a list, one for each layer."""
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)
