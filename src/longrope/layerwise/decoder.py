"""Find a model's decoder and its list of layers."""

from typing import Any

from torch import nn

from longrope.rope.rotary import find_rotary


def find_layers(model: nn.Module) -> tuple[Any, str]:
    """Return a model's decoder and the attribute name of its layer list.

    Raises:
        ValueError: the decoder has no module list of ``num_hidden_layers`` layers.
    """
    site = find_rotary(model)
    if site is not None:
        expected = site.owner.config.num_hidden_layers  # type: ignore[union-attr]
        for name, child in site.owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == expected:
                return site.owner, name
    raise ValueError(f"{type(model).__name__} has no list of decoder layers beside a rotary module")
