"""Read and write the key-value pairs and tensors of GGUF files."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from longrope.models.gguf_file import require_gguf


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to read from or write to a GGUF file; its data is loaded on writing."""

    name: str
    shape: tuple[int, ...]  # of ``data``: for quantised kinds the last one counts bytes
    dtype: Any
    nbytes: int
    kind: Any  # gguf.GGMLQuantizationType
    data: Callable[[], np.ndarray]


# Key, value, its GGUF type, and that of an array's members.
Metadata = list[tuple[str, Any, Any, Any]]


def read_metadata(reader: Any) -> tuple[str, Metadata]:
    """Read the architecture of a GGUF file, and its other key-value pairs with their types."""
    gguf, items = require_gguf(), []
    arch = ""
    for field in reader.fields.values():
        if field.name == gguf.Keys.General.ARCHITECTURE:
            arch = field.contents()
        elif not field.name.startswith("GGUF."):
            kind = field.types[0]
            member = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            if member is not None and not field.data:
                continue  # an empty array, which the library cannot write
            items.append((field.name, field.contents(), kind, member))
    return arch, items


def read_tensors(reader: Any) -> list[Tensor]:
    """List the tensors of a GGUF file, quantised or not; they are memory-mapped, not read."""

    def tensor(found: Any) -> Tensor:
        data = found.data
        return Tensor(
            found.name, data.shape, data.dtype, data.nbytes, found.tensor_type, lambda: data
        )

    return [tensor(found) for found in reader.tensors]


def write_file(path: Path, arch: str, metadata: Metadata, tensors: list[Tensor]) -> None:
    """Write key-value pairs and tensors to a GGUF file, with one tensor in memory at a time."""
    gguf = require_gguf()
    writer = gguf.GGUFWriter(path, arch)
    for key, value, kind, member in metadata:
        if key == gguf.Keys.General.ALIGNMENT:
            writer.data_alignment = value
        writer.add_key_value(key, value, kind, sub_type=member)
    for t in tensors:
        writer.add_tensor_info(t.name, t.shape, t.dtype, t.nbytes, raw_dtype=t.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t in tensors:
        writer.write_tensor_data(t.data())
    writer.close()
