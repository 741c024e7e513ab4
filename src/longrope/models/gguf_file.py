"""Open GGUF files, checked, and recognise the RoPE scaling in them."""

import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any

from longrope.errors import first_line, shortened
from longrope.files.parse import refuse_lfs_pointer
from longrope.models.config_check import check_config

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
# GGUF's names of sizes, by those of a Hugging Face config.
_NAMES = {
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "v_head_dim",
    "rope.dimension_count": "rotary_dim",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
    "expert_count": "num_experts",
    "context_length": "max_position_embeddings",
}
# llama.cpp reads the second where there is no first.
_FACTORS = ("rope.scaling.factor", "rope.scale_linear")
SCALING_KEYS = ("rope.scaling.", "rope.scale_linear")


def require_gguf() -> Any:
    """Import the ``gguf`` package, which reads and writes GGUF files.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError(
            "GGUF files require the gguf package: pip install 'longrope[gguf]'"
        ) from None
    return gguf


def open_gguf(path: Path) -> Any:
    """Open a GGUF file as a ``gguf.GGUFReader``, after a check of its header.

    The reader itself believes every count in the header, and reads on beyond the file's end.

    Raises:
        ValueError: no such file, not a GGUF file, one of several files of a model, a damaged
            header, or sizes no model has.
    """
    gguf = require_gguf()
    refuse_lfs_pointer(path)
    try:
        _check_header(path)
        reader = gguf.GGUFReader(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or first_line(error)}") from None
    # The package raises dozens of types for damaged files, struct and numpy their own.
    except Exception as error:
        raise ValueError(
            f"{path}: not a GGUF file, or a damaged one ({shortened(first_line(error), 200)})"
        ) from None
    known = value_of(reader)
    parts = known.get("split.count", 1)
    if parts != 1:
        raise ValueError(
            f"{path} is one of {shortened(parts)} files; join them with llama-gguf-split --merge"
        )
    sizes = {config: known[name] for name, config in _NAMES.items() if name in known}
    check_config(sizes, str(path))
    return reader


def value_of(reader: Any) -> dict[str, Any]:
    """Return the single values of a GGUF file by key, without the architecture's name before it."""
    arch = _contents(reader.fields.get("general.architecture"))
    found = {}
    for key, field in reader.fields.items():
        if field.types[0] != _ARRAY:
            found[key.removeprefix(f"{arch}.")] = _contents(field)
    return found


def _contents(field: Any) -> Any:
    return None if field is None else field.contents()


def frequency_divisor(known: dict[str, Any]) -> float:
    """Return the number that llama.cpp divides every frequency by: 1 without linear scaling.

    Args:
        known: what :func:`value_of` returns.

    Raises:
        ValueError: it is no positive finite number.
    """
    if known.get("rope.scaling.type") == "none":
        return 1.0
    name = next((name for name in _FACTORS if name in known), None)
    factor = known[name] if name else 1.0
    number = isinstance(factor, int | float) and math.isfinite(factor) and factor >= 0
    if not number:
        raise ValueError(f"{name} is {shortened(factor)}; it must be a positive finite number")
    return float(factor) or 1.0  # llama.cpp takes 0 for none


def scaling_of(reader: Any) -> str | None:
    """Return what scales the RoPE of a GGUF file in llama.cpp, for messages; None if nothing does.

    A factor without a type is linear scaling; ``rope.scale_linear`` is its older name.
    """
    known = value_of(reader)
    kind = known.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        return str(kind)
    for name in _FACTORS:
        if name in known and known[name] not in (0, 1) and kind != "none":
            return f"{name} {shortened(known[name])}"
    if known.get("rope.scaling.attn_factor", 1) not in (0, 1):
        return f"rope.scaling.attn_factor {shortened(known['rope.scaling.attn_factor'])}"
    factors = re.compile(r"(^|\.)rope_(freqs|factors)")
    return next((t.name for t in reader.tensors if factors.search(t.name)), None)


def _check_header(path: Path) -> None:
    """Refuse a GGUF header with counts or lengths beyond the file's end, or arrays of arrays."""
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise ValueError("too short")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(data).check()


class _Header:
    """A walk over the header of a GGUF file."""

    def __init__(self, data: mmap.mmap):
        self._data, self._at = data, 0
        # The low half of the version is 0 in files of the other byte order.
        self._order = "<" if data[4:6] != b"\0\0" else ">"

    def check(self) -> None:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 8
        tensors, pairs = self._number("Q"), self._number("Q")
        self._require(pairs, 12, "key-value pairs")
        for _ in range(pairs):
            key = self._string("a key")
            self._value(self._number("I"), key)
        self._require(tensors, 24, "tensors")
        for _ in range(tensors):
            name = self._string("a tensor's name")
            dimensions = self._number("I")
            if dimensions > 4:
                raise ValueError(f"tensor {shortened(name)} has {dimensions} dimensions")
            shape = [self._number("Q") for _ in range(dimensions)]
            if math.prod(shape) > 8 * len(self._data):  # at least a bit each
                raise ValueError(f"tensor {shortened(name)} is larger than the file: {shape}")
            self._at += 12

    def _value(self, kind: int, key: str) -> None:
        if kind == _STRING:
            self._string(key)
        elif kind == _ARRAY:
            member, count = self._number("I"), self._number("Q")
            if member == _STRING:
                self._require(count, 8, key)
                for _ in range(count):
                    self._string(key)
            elif member in _SIZES:
                self._require(count, _SIZES[member], key)
                self._at += count * _SIZES[member]
            else:
                raise ValueError(f"{shortened(key)} is an array of arrays or of an unknown type")
        elif kind in _SIZES:
            self._require(1, _SIZES[kind], key)
            self._at += _SIZES[kind]
        else:
            raise ValueError(f"{shortened(key)} is of an unknown type, {kind}")

    def _string(self, what: str) -> str:
        length = self._number("Q")
        self._require(length, 1, what)
        self._at += length
        return self._data[self._at - length : self._at].decode("utf-8")

    def _number(self, form: str) -> int:
        (value,) = struct.unpack_from(self._order + form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _require(self, count: int, size: int, what: str) -> None:
        if count * size > len(self._data) - self._at:
            raise ValueError(f"{shortened(what)}: {count:,} of them reach beyond the file's end")
