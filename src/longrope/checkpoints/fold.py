"""Fold an attention factor into the query projections.

The factor multiplies the cosines and sines of queries and keys, so it scales the attention
logits of the rotary dimensions by its square. Scaling the query projection by that square is
equivalent, unless a norm between projection and rotation undoes it.
"""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from longrope.models.weights import stored_tensors

_QUERY = re.compile(r"\.(\d+)\.(self_attn|attention|attn)\.q_proj\.(weight|bias)$")
_TOWER = re.compile(r"vision|visual|audio|image|tower|encoder")
_NORM = re.compile(r"(?<![a-z])(q|k|query|key)_?(layer)?norm")


def why_not_foldable(names: list[str], layers: int) -> str | None:
    """Return why the query projections among these tensors cannot take a factor, or None."""
    stacks = _stacks(names)
    whole = [prefix for prefix, found in stacks.items() if found == layers]
    if len(whole) > 1:
        return f"{' and '.join(whole)} each have q_proj in {layers} layers"
    if any("kv_a_proj" in name for name in names):
        return "its keys and values are compressed"
    norm = next((name for name in names if _NORM.search(name)), None)
    if norm is not None:
        return f"it normalises queries or keys after projecting them ({norm})"
    if whole and _TOWER.search(whole[0]):
        return f"only {whole[0]} has q_proj"
    if not whole:
        return f"it has q_proj in {max(stacks.values(), default=0)} of {layers} layers"
    return None


def _stacks(names: list[str]) -> Counter[str]:
    """Count the query projections to fold into, per prefix (vision towers have some too)."""
    found = (m for name in names if (m := _QUERY.search(name)) and m[3] == "weight")
    return Counter(m.string[: m.start()] for m in found)


def fold_attention_factor(source: Path, config: Any, square: float) -> Callable[[Path, Path], None]:
    """Return a function that copies a weight file and folds a factor into its query projections.

    Their rotated dimensions are multiplied by ``square``.

    Args:
        config: transformers' text config of the model.
        square: the square of the factor to fold.

    Raises:
        ValueError: the architecture cannot take the factor; the message says why.
    """
    names = [name for name, _ in stored_tensors(source)]
    layers = config.num_hidden_layers
    reason = why_not_foldable(names, layers)
    if reason is not None:
        raise ValueError(
            f"{source}: the attention factor cannot be folded into the query projections: {reason}"
        )
    text = next(prefix for prefix, found in _stacks(names).items() if found == layers)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rotary = round(head_dim * (config.rope_parameters.get("partial_rotary_factor") or 1.0))
    # SmolLM3's, despite its name: 1 where a layer has RoPE.
    rotated = getattr(config, "no_rope_layers", None)

    def scaled(name: str, tensor: Tensor) -> Tensor:
        found = _QUERY.search(name) if name.startswith(f"{text}.") else None
        if found is None or (rotated and not rotated[int(found[1])]):
            return tensor
        rows = tensor.double().reshape(heads, head_dim, -1)
        rows[:, :rotary] *= square
        return rows.reshape(tensor.shape).to(tensor.dtype)

    def copy(file: Path, target: Path) -> None:
        with safe_open(file, framework="pt") as weights:
            tensors = {name: scaled(name, weights.get_tensor(name)) for name in weights.keys()}  # noqa: SIM118
            save_file(tensors, target, metadata=weights.metadata())

    return copy


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest log-probability difference of two logits in nats, to check a folding."""
    a, b = (torch.log_softmax(logits.double(), dim=-1) for logits in (one, other))
    return float((a - b).abs().max())
