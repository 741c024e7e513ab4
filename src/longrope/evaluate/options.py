"""What a comparison or an evaluation is asked: which methods and files, at which lengths."""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longrope.data.documents import check_sources
from longrope.models.info import ModelInfo
from longrope.models.target import starting_point
from longrope.rope.apply import check_fits
from longrope.rope.methods import METHODS
from longrope.rope.rescale import Rescale, load_rescale
from longrope.units import check_lengths, parse_length

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """What an evaluation may be told; see ``longrope compare --help``.

    With ``own_attention_factors`` every method stands there twice: with the one
    attention factor that all share, and with its own where that differs.
    """

    methods: tuple[str, ...]
    lengths: tuple[str, ...]
    target: str | None = None
    data: tuple[str, ...] = ()
    field: str = "text"
    pack: bool = False
    stride: int | None = None
    tokens_per_document: int | None = None
    attention_factor: float | None = None
    own_attention_factors: bool = False
    chunk: int | None = None
    offload_activations: str | None = None

    def check(self, info: ModelInfo) -> None:
        """Refuse what cannot work on a model, before its weights are read.

        Raises:
            ValueError: an unknown method, a rescale file of another shape, no length, or
                data that is not there.
        """
        lengths, _ = self.resolve(info)
        check_lengths(lengths, self.stride)
        original = info.original_max_position_embeddings
        if self.target and original and parse_length(self.target, original) < original:
            raise ValueError(
                f"--target is {self.target}, and the model handles {original:,} tokens already: a "
                "method made for less would change nothing"
            )
        for name in ("tokens_per_document", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        assert info.rotary_dim and info.rope_theta
        for entry in self.entries(info):
            rescale = entry.rescale(lengths[-1])
            check_fits(rescale, info.rotary_dim // 2, info.rope_theta)
            made_for = rescale.max_position_embeddings
            if entry.name in set(self.methods) - set(METHODS) and made_for < lengths[-1]:
                log.warning(
                    "%s is made for %s tokens, and measured at %s",
                    entry.name,
                    f"{made_for:,}",
                    f"{lengths[-1]:,}",
                )
        check_sources(self.data)

    def require_all_of(self, file: Path, info: ModelInfo) -> None:
        """See that a comparison which is there already is this one, or a part of it.

        Raises:
            ValueError: it has another target, or methods or lengths that this one has not.
        """
        if not file.exists():
            return
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
            rows = {(row["method"], row["length"]) for row in there["perplexity"]}
            before, of = there["target"], there.get("of")  # of an older version's is not known
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}: no comparison is in it; give another --out") from None
        lengths, target = self.resolve(info)
        rows -= {(entry.name, length) for entry in self.entries(info) for length in lengths}
        other = [f"for {before:,} tokens"] if before != target else []
        other += [f"with {name} at {length:,}" for name, length in sorted(rows)[:3]]
        now = self.of(info)
        other += [f"of {key} {of.get(key)}" for key in now if of and of.get(key) != now[key]]
        if other:
            raise ValueError(
                f"{file}: holds another comparison ({', '.join(other)}); give another --out, or "
                "delete it"
            )

    def of(self, info: ModelInfo) -> dict[str, Any]:
        """What is compared, beside methods and lengths."""
        keys = ("data", "field", "pack", "stride", "tokens_per_document", "attention_factor")
        asked = {key: getattr(self, key) for key in keys}
        return json.loads(json.dumps({"model": info.source} | asked))

    def entries(self, info: ModelInfo) -> list["Entry"]:
        """What is scored: a line per method and file."""
        return _entries(info, self, self.resolve(info)[1])

    def resolve(self, info: ModelInfo) -> tuple[list[int], int]:
        """Lengths in tokens, ascending, and the length that methods are made for."""
        original = info.original_max_position_embeddings
        assert original is not None
        lengths = sorted({parse_length(text, original) for text in self.lengths})
        target = parse_length(self.target, original) if self.target else lengths[-1]
        return lengths, max(target, original)

    @property
    def directory(self) -> Path:
        """Where the result goes by itself: beside the first rescale file."""
        files = [Path(name) for name in self.methods if name not in METHODS]
        return files[0].parent if files else Path("compare")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a comparison: a name, and the rescale for a sequence of some length."""

    name: str
    rescale: Callable[[int], Rescale]


def _entries(info: ModelInfo, options: CompareOptions, target: int) -> list[Entry]:
    """A line per method, made for ``target``, and per file; raises for what is neither."""
    shared = options.attention_factor
    named = [name for name in options.methods if name not in METHODS]
    files = {name: load_rescale(name, info.rescale("none", target)) for name in named}
    if shared is None and options.own_attention_factors:
        shared = next((file.attention_factor for file in files.values()), None)
        if shared is None:
            shared = starting_point(info, target, None).attention_factor
    entries = []
    for name in options.methods:
        if name in files:
            entries.append(Entry(name, lambda length, file=files[name]: file))
            continue
        own = Entry(name, lambda length, name=name: info.rescale(name, target, length))
        factor = own.rescale(target).attention_factor
        if shared is None or name == "none" or factor == shared:
            entries.append(own)
            continue
        entries.append(
            Entry(
                name, lambda length, own=own: own.rescale(length).replace(attention_factor=shared)
            )
        )
        if options.own_attention_factors:
            entries.append(Entry(f"{name} (attention factor {factor:.4g})", own.rescale))
    return entries
