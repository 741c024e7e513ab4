"""Import the factors of a checkpoint that is already scaled."""

from pathlib import Path

from transformers import AutoConfig

from longrope.checkpoints.gguf import read_pair
from longrope.checkpoints.manifest import Manifest
from longrope.checkpoints.run_directory import is_run, short_attention_factor
from longrope.models.meta import build_meta_model
from longrope.models.sources import read_pretrained
from longrope.progress import quiet
from longrope.rope.own_scaling import own_pair
from longrope.rope.pair import RescalePair
from longrope.rope.rescale import Rescale
from longrope.rope.rotary import UNSCALED


def import_pair(source: str, *, trust_remote_code: bool = False) -> RescalePair:
    """Import the factors of a scaled checkpoint as a pair (twice the same if it has one set).

    Reads ``longrope``, ``yarn``, ``llama3``, ``linear`` and ``dynamic`` scaling (the last at its
    longest), and GGUF files with factor tensors. For a checkpoint that longrope exported the
    factors are exact, and made for the weights before an attention factor was folded into them.

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
        raise ValueError(
            f"{source}: its RoPE is not scaled; give a model with scaled RoPE to import"
        )
    return manifest.pair if manifest is not None and manifest.describes(found) else found


def _of_config(source: str, trust_remote_code: bool, only: str | None = None) -> RescalePair | None:
    """Read a checkpoint's scaling as transformers does: from the rotary module that it builds.

    Args:
        only: the ``rope_type`` to read; the others are then None.
    """
    with quiet():
        config = read_pretrained(AutoConfig, source, trust_remote_code)
        site = build_meta_model(source, config, trust_remote_code)[1]
    if site is None or site.rope_type in UNSCALED or only not in (None, site.rope_type):
        return None
    try:
        return own_pair(site)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{source}: its {site.rope_type} scaling cannot be read ({error}); correct its "
            "rope_parameters (rope_scaling in older configs)"
        ) from None


def find_pair(source: str, trust_remote_code: bool = False) -> RescalePair | None:
    """Import the pair of an extended model from its run, GGUF file or config; None for others.

    Raises:
        ValueError: no such model, or files that cannot be read.
    """
    run = Path(source)
    if is_run(run):
        short, long = (Rescale.load(run / name) for name in ("short.json", "rescale.json"))
        return RescalePair(short, long, short_attention_factor(run))
    if run.is_file() and run.suffix == ".gguf":
        return read_pair(run)[0]
    return _of_config(source, trust_remote_code, only="longrope")
