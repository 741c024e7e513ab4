"""Write and read GGUF files with factor tensors, which llama.cpp applies."""

import json
from pathlib import Path

import numpy as np

from longrope.checkpoints.gguf_io import (
    Metadata,
    Tensor,
    read_metadata,
    read_tensors,
    write_file,
)
from longrope.checkpoints.llama_gguf import llama_metadata, llama_tensors
from longrope.checkpoints.manifest import Manifest
from longrope.files.atomic import atomic_file
from longrope.files.parse import content_of
from longrope.models.gguf_file import (
    SCALING_KEYS,
    frequency_divisor,
    open_gguf,
    require_gguf,
    scaling_of,
    value_of,
)
from longrope.rope.pair import RescalePair

# Architectures whose graph in llama.cpp multiplies by rope_factors_* (or rope_freqs), by name.
READS_FACTORS = (
    "llama",
    "phi3",
    "phimoe",
    "minicpm",
    "minicpm3",
    "mistral3",
    "granite",
    "granitemoe",
    "apertus",
)
LONG, SHORT, ONE = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"
MANIFEST = "longrope.intent"


def export_gguf(source: Path, manifest: Manifest, path: Path) -> None:
    """Write a GGUF file with factor tensors, from a GGUF file or a Hugging Face checkpoint.

    It holds both sets (``rope_factors_long`` and ``_short``, with the boundary in
    ``rope.scaling.original_context_length``), or for ``gguf-static`` the long one as
    ``rope_freqs``. The weights of a GGUF file are copied unchanged, quantised or not.

    Args:
        source: a GGUF file, or a checkpoint's directory of the Llama or Mistral architecture.

    Raises:
        ValueError: llama.cpp does not apply factors to this architecture, or the conversion
            is one that only llama.cpp's own converter knows.
    """
    if source.is_file():
        reader = open_gguf(source)
        arch, metadata = read_metadata(reader)
        tensors = read_tensors(reader)
    else:
        arch, metadata = llama_metadata(source)
        tensors = llama_tensors(source)
    require_factors_read(arch, source)
    dropped = (*(f"{arch}.{key}" for key in SCALING_KEYS), MANIFEST)
    metadata = [item for item in metadata if not item[0].startswith(dropped)]
    metadata = [item for item in metadata if item[0] != f"{arch}.context_length"]
    metadata += scaling_metadata(arch, manifest)
    tensors = [t for t in tensors if t.name not in (LONG, SHORT, ONE)] + _factors(manifest)
    with atomic_file(path) as temporary:
        write_file(temporary, arch, metadata, tensors)


def scaling_metadata(arch: str, manifest: Manifest) -> Metadata:
    """Return the GGUF key-value pairs that tell llama.cpp how to use the factor tensors.

    ``rope.scaling.factor`` is left out: it would divide every frequency once again.
    """
    kinds = require_gguf().GGUFValueType
    long = manifest.pair.long
    items: Metadata = [
        (f"{arch}.context_length", long.max_position_embeddings, kinds.UINT32, None),
        (f"{arch}.rope.scaling.attn_factor", long.attention_factor, kinds.FLOAT32, None),
        (MANIFEST, json.dumps(manifest.to_json()), kinds.STRING, None),
    ]
    if not manifest.static:
        boundary = manifest.pair.recovery_length
        items += [
            (f"{arch}.rope.scaling.type", "longrope", kinds.STRING, None),
            (f"{arch}.rope.scaling.original_context_length", boundary, kinds.UINT32, None),
        ]
    return items


def require_factors_read(arch: str, source: Path) -> None:
    """Refuse a GGUF architecture for which llama.cpp would ignore the factor tensors.

    Raises:
        ValueError: the message names the architecture.
    """
    if arch not in READS_FACTORS:
        raise ValueError(
            f"{source}: llama.cpp reads no factor tensors for the architecture {arch!r} (only for "
            f"{', '.join(READS_FACTORS)}); use format='hf' and another engine"
        )


def read_pair(path: Path) -> tuple[RescalePair | None, Manifest | None]:
    """Read the factor tensors of a GGUF file as a pair, and its manifest; None if unscaled.

    Raises:
        ValueError: not a GGUF file, or scaling of a kind that has no factor tensors.
    """
    from longrope.rope.rescale import Rescale

    reader = open_gguf(path)
    known = value_of(reader)
    found = {t.name: t.data.tolist() for t in reader.tensors if t.name in (LONG, SHORT, ONE)}
    scaling = scaling_of(reader)
    if not found:
        if scaling is not None:
            raise ValueError(
                f"{path} has scaling ({scaling}) without factor tensors, because llama.cpp "
                "computes them; import the Hugging Face checkpoint instead"
            )
        return None, None
    with content_of(path, "write the file again"):
        if (kind := known.get("rope.scaling.type", "linear")) == "yarn":
            raise ValueError(f"{kind!r} scaling beside factor tensors")
        target = int(known["context_length"])
        divisor = frequency_divisor(known)
        long, short = found.get(LONG, found.get(ONE)), found.get(SHORT, found.get(ONE))
        boundary = int(known.get("rope.scaling.original_context_length", target))
        shared = {
            "rope_theta": float(known.get("rope.freq_base", 10000.0)),
            "original_max_position_embeddings": boundary,
            "attention_factor": float(known.get("rope.scaling.attn_factor", 1.0)) or 1.0,
        }
        short, long = ([divisor * f for f in factors or ()] for factors in (short, long))
        pair = RescalePair(
            Rescale(tuple(short), max_position_embeddings=boundary, **shared),
            Rescale(tuple(long), max_position_embeddings=target, **shared),
        )
        written = known.get(MANIFEST)
        return pair, Manifest.from_json(json.loads(written)) if written else None


def _factors(manifest: Manifest) -> list[Tensor]:
    kind = require_gguf().GGMLQuantizationType.F32
    pair = manifest.pair
    sets = {ONE: pair.long} if manifest.static else {LONG: pair.long, SHORT: pair.short}

    def tensor(name: str, factors: tuple[float, ...]) -> Tensor:
        values = np.array(factors, dtype=np.float32)
        return Tensor(name, values.shape, values.dtype, values.nbytes, kind, lambda: values)

    return [tensor(name, rescale.factors) for name, rescale in sets.items()]
