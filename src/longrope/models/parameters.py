"""Parameter counts of a model's text part."""

from typing import Any

from torch import nn

from longrope.rope.rotary import find_rotary


def active_parameters(model: nn.Module, config: Any) -> int:
    """The parameters that one token is multiplied with: of experts those that it is sent to."""
    met = text_parameters(model)
    experts = sum(p.numel() for name, p in met.items() if ".experts." in name)
    total = sum(p.numel() for p in met.values())
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    count = _first(config, *counts)
    chosen = _first(config, "num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
    if not (experts and count and chosen):
        return total
    return total - experts + experts * min(chosen, count) // count


def is_tied(model: nn.Module) -> bool:
    """Whether the embeddings are the head too; of a model for pictures its whole config says so."""
    return bool(getattr(model.config, "tie_word_embeddings", False))


def text_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a text meets, by name: all but the towers of a model for pictures or sound."""
    config, site = model.config, find_rotary(model)
    everything = dict(model.named_parameters())
    if site is None or config.get_text_config() is config:  # type: ignore[union-attr,operator]
        return everything
    head = model.get_output_embeddings()  # type: ignore[operator]
    met = {id(p) for part in (site.owner, head) if part is not None for p in part.parameters()}
    return {name: p for name, p in everything.items() if id(p) in met}


def _first(config: Any, *names: str) -> int | None:
    """The first of some fields that is a number; some families have a list, one for each layer."""
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if type(value) is int and value > 0), None)
