"""Parameter counts of a model's text part."""

from typing import Any

from torch import nn

from longrope.rope.rotary import find_rotary


def active_parameters(model: nn.Module, config: Any) -> int:
    """Count the parameters that one token is multiplied with; of experts, those it is routed to."""
    met = text_parameters(model)
    experts = sum(p.numel() for name, p in met.items() if ".experts." in name)
    total = sum(p.numel() for p in met.values())
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    count = _first(config, *counts)
    chosen = _first(config, "num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
    if not (experts and count and chosen):
        return total
    return total - experts + experts * min(chosen, count) // count


def is_tied(model: Any) -> bool:
    """Return whether a model's embeddings and output head share parameters."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return bool(getattr(model.config, "tie_word_embeddings", False))
    return head.weight is embeddings.weight


def text_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that text passes through, by name (no vision or audio towers)."""
    config, site = model.config, find_rotary(model)
    everything = dict(model.named_parameters())
    if site is None or config.get_text_config() is config:  # type: ignore[union-attr,operator]
        return everything
    head = model.get_output_embeddings()  # type: ignore[operator]
    met = {id(p) for part in (site.owner, head) if part is not None for p in part.parameters()}
    return {name: p for name, p in everything.items() if id(p) in met}


def _first(config: Any, *names: str) -> int | None:
    """Return a config's first field that is a positive number, to count parameters of experts.

    Some families have a list per layer, which is skipped.
    """
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if type(value) is int and value > 0), None)
