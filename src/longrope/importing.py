"""The rescale that a checkpoint has already, whoever made it."""

from pathlib import Path

from transformers import AutoConfig

from longrope.export.gguf import read_pair
from longrope.export.intent import Intent
from longrope.rope.methods import dynamic_ntk
from longrope.rope.rescale import Rescale
from longrope.rope.site import UNSCALED, RotarySite, existing_factors, scaled_length
from longrope.rope.switch import Pair
from longrope.skeleton import skeleton
from longrope.source import quiet, read_pretrained


def import_pair(source: str, *, trust_remote_code: bool = False) -> Pair:
    """The factors that a model applies: a pair, twice the same where there is one set.

    ``longrope``, ``yarn``, ``llama3``, ``linear`` and ``dynamic`` scaling (the last as it is
    at its longest), and GGUF files with factor tensors. What ``longrope export`` wrote
    comes back exactly as it went in: for the weights *before* an attention factor was folded.

    Raises:
        ValueError: no such model, it is unscaled, or its scaling is of another kind.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{source}: no such file")
        found, intent = read_pair(path)
    else:
        found = _of_config(source, trust_remote_code)
        intent = Intent.load(path) if path.is_dir() else None
    if found is None:
        raise ValueError(f"{source}: its RoPE is not scaled; there is nothing to import")
    return intent.pair if intent is not None and intent.describes(found) else found


def _of_config(source: str, trust_remote_code: bool) -> Pair | None:
    with quiet():
        config = read_pretrained(AutoConfig, source, trust_remote_code)
        pair = Pair.from_config(config)
        if pair is not None:
            return pair
        site = skeleton(source, config, trust_remote_code)[1]
    if site is None or site.rope_type in UNSCALED:
        return None
    rescale = _of_site(site, config.get_text_config().max_position_embeddings)
    return Pair(rescale, rescale)


def _of_site(site: RotarySite, longest: int) -> Rescale:
    """What a module of transformers computes, as factors on the unscaled frequencies."""
    parameters, kind = site.parameters, site.rope_type
    original = parameters.get("original_max_position_embeddings") or longest
    longest = scaled_length(parameters, longest)
    theta = float(parameters["rope_theta"])
    if kind == "dynamic":
        return dynamic_ntk(theta, 2 * len(site.inv_freq), original, longest, length=longest)
    return Rescale(
        tuple(existing_factors(site).tolist()),
        rope_theta=theta,
        original_max_position_embeddings=original,
        max_position_embeddings=max(longest, original),
        attention_factor=site.attention_factor,
        provenance={"method": kind},
    )
