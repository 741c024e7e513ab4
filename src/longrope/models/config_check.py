"""Check a model's config before transformers builds from it: sizes, and values of RoPE fields."""

import math
import re
from collections.abc import Iterator
from typing import Any

from longrope.errors import shortened
from longrope.units import LONGEST

# Largest value of integers by the end of their name. A model is built layer by layer to inspect it,
# and its frequencies are compared with its cosines, d × d/2 numbers.
_LARGEST = (
    (re.compile(r"layers?$"), 2_000),
    (re.compile(r"experts$"), 16_384),
    (re.compile(r"heads?(_kv)?$"), 65_536),
    (re.compile(r"(head|rope|rotary|qk|v)\w*_dim$|rotary_dim$"), 16_384),
    (re.compile(r"(size|dim|embd|d_model|d_ff|inner)$"), 2**26),
    (re.compile(r"(positions|position_embeddings|n_ctx)$"), LONGEST),
)
_AT_LEAST_ONE = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads")
_AT_LEAST_ONE += ("max_position_embeddings", "original_max_position_embeddings")
BLOCKS = ("rope_parameters", "rope_scaling")
_POSITIVE = ("rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor")
_NUMBERS = (*_POSITIVE, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_NUMBERS += ("low_freq_factor", "high_freq_factor", "short_mscale", "long_mscale")


def check_config(config: dict[str, Any], where: str) -> None:
    """Refuse a config with sizes that no model has, or RoPE fields that no model computes with.

    Args:
        config: the content of ``config.json``.
        where: the source of the config, for messages.

    Raises:
        ValueError: names the source, the field, its value and the remedy.
    """
    for name, value in _fields(config):
        key = name.rpartition(".")[2]
        if type(value) is int:
            least = 1 if key in _AT_LEAST_ONE else -math.inf
            most = next((limit for end, limit in _LARGEST if end.search(key)), 2**63 - 1)
            if not least <= value <= most:
                allowed = f"at most {most:,}" if value > most else "at least 1"
                raise ValueError(
                    f"{where}: {name} is {shortened(value)}; it must be {allowed}; correct the "
                    "field"
                )
        if key in BLOCKS and value is not None and not isinstance(value, dict):
            raise ValueError(
                f"{where}: {name} is {shortened(value)}; it must be an object with a rope_type, "
                "or null"
            )
        if key in _NUMBERS and value is not None:
            _check_number(where, name, value, positive=key in _POSITIVE)
        if key in ("short_factor", "long_factor") and value is not None:
            for i, factor in enumerate(value if isinstance(value, list) else [value]):
                _check_number(where, f"{name}[{i}]", factor, positive=True)


def _check_number(where: str, name: str, value: Any, positive: bool) -> None:
    """Refuse a RoPE field that is no number; a few models have lists, one number per layer."""
    if isinstance(value, list | dict):
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) < 1e36 or (positive and value <= 0):
        kind = "positive finite number" if positive else "finite number"
        raise ValueError(
            f"{where}: {name} is {shortened(value)}; it must be a {kind} (without quotes); "
            "correct the field"
        )


def _fields(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the fields of a config, its nested configs and RoPE parameters, by dotted name."""
    for key, value in config.items():
        yield prefix + key, value
        nested = key.endswith("_config") or key in BLOCKS or prefix.rstrip(".").endswith(BLOCKS)
        if isinstance(value, dict) and nested:
            yield from _fields(value, f"{prefix}{key}.")


def rope_fault(config: Any) -> str | None:
    """Return which RoPE field keeps transformers from building a model, or None if it is another.

    Args:
        config: transformers' config object.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found = getattr(config.get_text_config(), "rope_parameters", None)
    if not isinstance(found, dict):
        return None
    parts = [value for value in found.values() if isinstance(value, dict)]
    for part in parts or [found]:
        kind = part.get("rope_type", part.get("type", "default"))
        if kind not in ("default", *ROPE_INIT_FUNCTIONS):
            meant = "; 'su' was the first name of 'longrope'" if kind == "su" else ""
            return (
                f"rope_type is {shortened(kind)}, which its class in transformers does not know: "
                f"correct rope_type (or type) in its config, one of default, "
                f"{', '.join(sorted(ROPE_INIT_FUNCTIONS))}{meant}"
            )
        for name in ("rope_theta", "factor"):
            needed = name == "rope_theta" or kind in ("linear", "dynamic", "llama3")
            if needed and part.get(name) is None:
                return f"{name} is null: give the number in its config"
        if kind == "longrope" and not all(
            isinstance(part.get(name), list) for name in ("short_factor", "long_factor")
        ):
            return "short_factor and long_factor must be lists of numbers: correct its config"
    return None
