"""The rescale that a checkpoint has already, whoever made it."""

from pathlib import Path

from transformers import AutoConfig

from longrope.checkpoints.gguf import read_pair
from longrope.checkpoints.manifest import Manifest
from longrope.checkpoints.run_layout import is_run
from longrope.models.meta import build_meta_model
from longrope.models.sources import read_pretrained
from longrope.progress import quiet
from longrope.rope.methods import dynamic_ntk
from longrope.rope.pair import RescalePair
from longrope.rope.rescale import Rescale
from longrope.rope.rotary import UNSCALED, RotarySite, existing_factors, scaled_length


def import_pair(source: str, *, trust_remote_code: bool = False) -> RescalePair:
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
        found, manifest = read_pair(path)
    else:
        found = _of_config(source, trust_remote_code)
        manifest = Manifest.load(path) if path.is_dir() else None
    if found is None:
        raise ValueError(f"{source}: its RoPE is not scaled; there is nothing to import")
    return manifest.pair if manifest is not None and manifest.describes(found) else found


def _of_config(source: str, trust_remote_code: bool) -> RescalePair | None:
    with quiet():
        config = read_pretrained(AutoConfig, source, trust_remote_code)
        pair = RescalePair.from_config(config)
        if pair is not None:
            return pair
        site = build_meta_model(source, config, trust_remote_code)[1]
    if site is None or site.rope_type in UNSCALED:
        return None
    rescale = _of_site(site, config.get_text_config().max_position_embeddings)
    return RescalePair(rescale, rescale)


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


def find_pair(source: str, trust_remote_code: bool = False) -> RescalePair | None:
    """The factors that a model was extended with, by its files alone; None for any other.

    Raises:
        ValueError: no such model, or files that cannot be read.
    """
    run = Path(source)
    if is_run(run):
        pair = RescalePair(Rescale.load(run / "short.json"), Rescale.load(run / "rescale.json"))
        free = pair.short.provenance.get("free_attention_factor")
        if free is None:
            return pair
        # What no checkpoint can say, our own runtime can do.
        return RescalePair(pair.short.replace(attention_factor=free), pair.long)
    if run.is_file() and run.suffix == ".gguf":
        return read_pair(run)[0]
    with quiet():
        return RescalePair.from_config(read_pretrained(AutoConfig, source, trust_remote_code))
