"""Keys of transformers' ``rope_parameters``: which a ``longrope`` config keeps."""

from typing import Any

from longrope.errors import shortened

LENGTH = "original_max_position_embeddings"
# Scales scores with the position (Ministral 3), in units of the length above.
BY_POSITION = "llama_4_scaling_beta"
_SCALING = {
    *("rope_type", "type", "factor", "attention_factor", LENGTH, "truncate", "finetuned"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attn_factor", "extrapolation_factor"),
    *("low_freq_factor", "high_freq_factor"),
    *("short_factor", "long_factor", "short_mscale", "long_mscale"),
}


def kept_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return those of a rotary embedding's ``rope_parameters`` that ``longrope`` scaling keeps.

    They are for a config whose ``rope_type`` becomes ``longrope``.

    ``partial_rotary_factor`` is dropped where ``longrope`` factors express it.
    """
    kept = {key: value for key, value in parameters.items() if key not in _SCALING}
    if parameters["rope_type"] == "proportional":
        kept.pop("partial_rotary_factor", None)
    if BY_POSITION in parameters:  # which is in units of it
        kept[LENGTH] = parameters[LENGTH]
    return kept


def ignored_scaling(parameters: dict[str, Any]) -> str | None:
    """Return a scaling field of ``rope_parameters`` that their ``rope_type`` leaves unused.

    It is returned as ``name value``; None if there is none, or it scales nothing.
    """
    if parameters["rope_type"] != "default":
        return None
    names = ("factor", "long_factor", "short_factor", "attention_factor", "beta_fast", "alpha")
    found = (name for name in names if parameters.get(name) not in (None, 1, []))
    name = next(found, None)
    return name and f"{name} {shortened(parameters[name])}"
