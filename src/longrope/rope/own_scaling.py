"""Read the scaling that a model's own rotary module applies, as rescales."""

from torch import nn

from longrope.rope.methods import dynamic_ntk
from longrope.rope.pair import RescalePair
from longrope.rope.rescale import Rescale
from longrope.rope.rotary import RotarySite, existing_factors, find_rotary, scaled_length


def own_pair(site: RotarySite) -> RescalePair:
    """Read the scaling of a rotary module as a pair: twice the same, except for ``longrope``.

    ``dynamic`` scaling is read at its longest.

    Raises:
        ValueError, KeyError, TypeError: parameters that cannot be read.
    """
    longest = site.module.config.max_position_embeddings
    if site.rope_type == "longrope":
        return _both_sets(site, longest)
    rescale = _only_set(site, longest)
    return RescalePair(rescale, rescale)


def own_rescale(model: nn.Module, length: int) -> Rescale | None:
    """Read a model's own scaling at a sequence length, in tokens, as a rescale.

    transformers recomputes ``longrope`` and ``dynamic`` frequencies at each call from the
    positions in it, and a forward pass in chunks would change them from chunk to chunk. None for
    scaling that does not depend on the length, which the model applies correctly by itself.
    """
    site = find_rotary(model)
    if site is None or site.rope_type not in ("longrope", "dynamic"):
        return None
    pair = own_pair(site)
    if site.rope_type == "longrope":
        return pair.choose(length)
    long = pair.long
    before = long.original_max_position_embeddings
    shape = (long.rope_theta, 2 * len(long.factors), before, long.max_position_embeddings)
    return dynamic_ntk(*shape, length=length, factor=site.parameters["factor"])


def _both_sets(site: RotarySite, longest: int) -> RescalePair:
    """Read ``longrope`` scaling: the factors of its config, and the lengths that apply."""
    parameters = site.parameters
    recovery = parameters["original_max_position_embeddings"]
    shared = {
        "rope_theta": float(parameters["rope_theta"]),
        "original_max_position_embeddings": recovery,
        "attention_factor": site.attention_factor,
    }
    return RescalePair(
        Rescale(tuple(parameters["short_factor"]), max_position_embeddings=recovery, **shared),
        Rescale(
            tuple(parameters["long_factor"]),
            max_position_embeddings=max(longest, recovery),
            **shared,
        ),
    )


def _only_set(site: RotarySite, longest: int) -> Rescale:
    """Read the scaling of a rotary module as factors on the unscaled frequencies."""
    parameters, kind = site.parameters, site.rope_type
    before, longest = longest, scaled_length(parameters, longest)
    original = parameters.get("original_max_position_embeddings") or before
    theta = float(parameters["rope_theta"])
    if kind == "dynamic":  # as in transformers, it starts from max_position_embeddings
        shape = (theta, 2 * len(site.inv_freq), before, longest)
        return dynamic_ntk(*shape, factor=parameters["factor"])
    return Rescale(
        tuple(existing_factors(site).tolist()),
        rope_theta=theta,
        original_max_position_embeddings=original,
        max_position_embeddings=max(longest, original),
        attention_factor=site.attention_factor,
        provenance={"method": kind},
    )
