"""Export an extended model in a format that inference engines load."""

import contextlib
import dataclasses
import logging
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from longrope.checkpoints import card
from longrope.checkpoints.folding_check import folding_check, needs_folding, with_folding
from longrope.checkpoints.gguf import export_gguf
from longrope.checkpoints.hf import export_directory, kept_files
from longrope.checkpoints.importer import find_pair, import_pair
from longrope.checkpoints.manifest import FILE, FORMATS, Format, Manifest
from longrope.checkpoints.run_directory import is_run, original_of
from longrope.execution import ExecutionConfig
from longrope.files.atomic import apply_umask, recover, scratch_directory, write_atomically
from longrope.files.parse import read_json
from longrope.labels import display_name
from longrope.models.info import ModelInfo, ScalingChoice, inspect_model
from longrope.models.load import load_model
from longrope.models.sources import local_copy, read_pretrained
from longrope.models.target_length import parse_extension
from longrope.models.weights import check_weights
from longrope.progress import announced, quiet
from longrope.rope.apply import check_fits
from longrope.rope.methods import METHODS
from longrope.rope.pair import RescalePair
from longrope.rope.rescale import Rescale, load_rescale

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Options of an export: the model, its factors, the format and the path.

    Args:
        model: a run of ``longrope extend``, a checkpoint, a hub id, or a GGUF file.
        long_factors, short_factors: rescale files, CSV files or methods' names; a run and an
            export have their own. Without ``short_factors`` the long ones serve every length.
        target: target length of a method or a CSV file.
        fold_attention_factor: write the attention factor that engines compute by themselves,
            and fold the rest into the query projections. Only mlx-lm needs it: transformers,
            vLLM and SGLang read the attention factor from the config.
        drop_start_tokens: export factors that were searched with n̂ > 0 as if it were 0.
        rope_scaling: keep or replace the scaling of the model. It applies to known methods;
            the factors of a rescale file include it.
        force: replace an earlier export at ``out``.
        hard_links: hard-link weight files instead of copying them. Whatever writes into one of
            them then changes the model that was exported too.
    """

    model: str
    out: Path
    format: Format = "hf"
    long_factors: str | None = None
    short_factors: str | None = None
    target: str | None = None
    fold_attention_factor: bool = False
    drop_start_tokens: bool = False
    rope_scaling: ScalingChoice | None = None
    original_length: int | None = None
    dtype: str = "bfloat16"
    force: bool = False
    hard_links: bool = False
    trust_remote_code: bool = False


def export(options: ExportOptions) -> Manifest:
    """Export a model to a checkpoint directory or GGUF file, and return the manifest.

    Raises:
        ValueError: an engine would compute something else than longrope, or ``out`` exists.
            Nothing is written to ``out`` then.
    """
    if options.format not in FORMATS:
        raise ValueError(f"format is {options.format!r}; choose {', '.join(FORMATS)}")
    gguf = options.format.startswith("gguf")
    if gguf and options.fold_attention_factor:
        raise ValueError(
            f"fold_attention_factor=True does not apply to format={options.format!r}, because "
            "llama.cpp reads the attention factor from the file; leave it out"
        )
    if options.hard_links and (gguf or options.fold_attention_factor):
        raise ValueError(
            f"hard_links=True does not apply to {'GGUF' if gguf else 'fold_attention_factor=True'},"
            " which writes the weights anew; leave it out"
        )
    if gguf and options.out.suffix != ".gguf":
        raise ValueError(f"out is {options.out}; the name of a GGUF file must end in .gguf")
    _require_model(Path(options.model))
    run = Path(options.model) if is_run(Path(options.model)) else None
    model = str(run / "model") if run else options.model
    if run:  # its scaling is ours, and its config calls the recovery length original
        before = Rescale.load(run / "rescale.json").original_max_position_embeddings
        options = dataclasses.replace(
            options,
            rope_scaling=options.rope_scaling or "replace",
            original_length=options.original_length or before,
        )
    _require_free(options, model)
    trusted = options.trust_remote_code
    held = find_pair(model, trusted) if not run and options.long_factors is None else None
    factors = _Factors.of_checkpoint(options, held) if held else _Factors.of(options, run)
    info = _inspect(options, model, factors)
    pair = _pair(options, factors, info)
    named = str((original_of(options.model) or {}).get("source", options.model))
    manifest = Manifest(options.format, display_name(named), pair)
    results = None if options.long_factors or options.short_factors else _results(run)
    with (
        announced(f"writing {options.out}"),
        _checkpoint(options, info, keep_gguf=gguf) as source,
    ):
        if gguf:
            export_gguf(source, manifest, options.out)
        else:
            if options.fold_attention_factor:
                manifest = with_folding(manifest, source)
            elif needs_folding(manifest):
                log.warning(
                    "mlx-lm will compute the attention factor %.6g instead of %.6g; to use mlx-lm, "
                    "fold it into the weights (`fold_attention_factor`)",
                    manifest.computed_attention_factor,
                    pair.long.attention_factor,
                )
            _write_directory(manifest, source, info, options, results)
    if gguf:
        write_atomically(_card_file(options.out), card.model_card(manifest, results))
    return manifest


def _require_model(path: Path) -> None:
    """Refuse to export the directory of a search, which has factors but no model.

    Raises:
        ValueError: states the command that exports its factors.
    """
    factors = path / "portable.json"
    if not is_run(path) and factors.is_file() and not (path / "config.json").exists():
        model = Rescale.load(factors).provenance.get("model", "MODEL")
        raise ValueError(
            f"{path} holds factors of a search and no model: give the model that was searched, and "
            f"long_factors, as in longrope export {shlex.quote(str(model))} --long-factors "
            f"{shlex.quote(str(factors))} --out {shlex.quote(str(path.with_name('exported')))}"
        )


def _require_free(options: ExportOptions, model: str) -> None:
    """Refuse to export over an existing ``out``; with ``force`` an earlier export may be there."""
    out, card_file = options.out.resolve(), _card_file(options.out)
    for file in (out, card_file):
        recover(file)
    for there in (options.out, card_file):
        if there.exists() and not options.force:
            raise ValueError(
                f"{there} exists already; give another `out`, or force=True to replace it"
            )
    if not out.exists():
        return
    if out.name == "model" and is_run(out.parent):
        raise ValueError(
            f"out is {options.out}, which belongs to a run and its results; give another `out`"
        )
    for read in (options.model, model, options.long_factors, options.short_factors):
        if read and Path(read).exists() and Path(read).resolve().is_relative_to(out):
            raise ValueError(
                f"out is {options.out}, which contains {read}, an input; give another `out`"
            )
    files = {file.name for file in out.iterdir()} if out.is_dir() else set()
    if files - {"lost+found"} and FILE not in files:
        raise ValueError(
            f"out is {options.out}, which is not an export ({FILE} is missing); force=True would "
            "delete all of its files: give another `out`"
        )


def _write_directory(
    manifest: Manifest,
    source: Path,
    info: ModelInfo,
    options: ExportOptions,
    results: dict[str, Any] | None,
) -> None:
    trusted = options.trust_remote_code
    check = None if manifest.folded is None else folding_check(manifest, source, info, trusted)
    export_directory(
        source,
        manifest,
        options.out,
        results=results,
        check=check,
        hard_links=options.hard_links,
        trust_remote_code=trusted,
    )


@dataclasses.dataclass(frozen=True)
class _Factors:
    """The factors to export, by name, and the contents of those that are rescale files."""

    long: str
    short: str | None
    files: dict[str, Rescale]

    @classmethod
    def of(cls, options: ExportOptions, run: Path | None) -> "_Factors":
        """Read the rescale files that the export options name, or the run's own.

        Raises:
            ValueError: no factors are named, or a method or CSV file has no target.
        """
        long = options.long_factors or (str(run / "rescale.json") if run else None)
        own = str(run / "short.json") if run and not options.long_factors else None
        short = options.short_factors or own
        if long is None:
            raise ValueError(
                "long_factors is missing; give a rescale file (longrope import writes that of a "
                "scaled model), a method, or a run as `model`"
            )
        files = {}
        for name in filter(None, (long, short)):
            if name in METHODS or Path(name).suffix == ".csv":
                if options.target is None:
                    raise ValueError(
                        f"target is missing; give the length that {name} is made for, such as 32k"
                    )
            elif Path(name).is_file():
                files[name] = Rescale.load(name)
        return cls(long, short, files)

    @classmethod
    def of_checkpoint(cls, options: ExportOptions, held: RescalePair) -> "_Factors":
        """Take the factors that an extended checkpoint has.

        Args:
            held: the pair in its config or file; in a static export, the long factors twice.

        Raises:
            ValueError: short factors of other origin, or a target.
        """
        for name in ("short_factors", "target"):
            if (value := getattr(options, name)) is not None:
                raise ValueError(
                    f"{name} is {value}, and {options.model} has its own factors: leave it out, or "
                    "give long_factors too"
                )
        own = import_pair(options.model, trust_remote_code=options.trust_remote_code)
        long, short = (f"the {kind} factors of {options.model}" for kind in ("long", "short"))
        if held.short.factors == held.long.factors:
            return cls(long, None, {long: own.long})
        return cls(long, short, {long: own.long, short: own.short})

    @property
    def lengths_before(self) -> list[int]:
        """Original lengths of the rescale files to export, the long one's first."""
        return [rescale.original_max_position_embeddings for rescale in self.files.values()]


def _inspect(options: ExportOptions, model: str, factors: _Factors) -> ModelInfo:
    """Inspect the model to export; the factors of a rescale file include its scaling.

    Raises:
        ValueError: no such model, or one that cannot be extended.
    """
    methods = {factors.long, factors.short} & set(METHODS)
    info = inspect_model(
        model,
        rope_scaling=options.rope_scaling if methods else "replace",
        original_length=options.original_length or next(iter(factors.lengths_before), None),
        trust_remote_code=options.trust_remote_code,
    )
    info.require_extendable()
    return info


def _pair(options: ExportOptions, factors: _Factors, info: ModelInfo) -> RescalePair:
    """Return the pair of rescales to export.

    Raises:
        ValueError: the factors do not fit the model or each other, or no checkpoint format can
            express them.
    """
    long = _rescale(factors.long, options, factors, info)
    short = _rescale(factors.short, options, factors, info) if factors.short else None
    if short is None:
        short = long.replace(max_position_embeddings=long.original_max_position_embeddings)
    if factors.short and short.max_position_embeddings >= long.max_position_embeddings:
        raise ValueError(
            f"`short_factors` ({factors.short}) is made for {short.max_position_embeddings:,} "
            f"tokens, and `long_factors` ({factors.long}) for {long.max_position_embeddings:,}; "
            "short factors must be made for fewer tokens (are the two exchanged?)"
        )
    if short.attention_factor != long.attention_factor:
        raise ValueError(
            f"attention_factor is {short.attention_factor:g} in `short_factors` and "
            f"{long.attention_factor:g} in `long_factors`, but a checkpoint has one for both; "
            "search the short factors with the attention factor of the long ones"
        )
    kept = any(factor != 1 for factor in long.base_factors)
    existing = "keep" if kept else options.rope_scaling
    info.check_representable(existing, short.max_position_embeddings)
    return RescalePair(short, long)


def _rescale(name: str, options: ExportOptions, factors: _Factors, info: ModelInfo) -> Rescale:
    """Return one set of factors to export: a method's on top of scaling that is kept, or a file's.

    Raises:
        ValueError: no such factors, not for this model, or no checkpoint can express them.
    """
    if name in factors.files:
        rescale = factors.files[name]
    else:
        target = parse_extension(options.target, info) if options.target else 0
        made = name in METHODS
        rescale = (
            info.rescale(name, target) if made else load_rescale(name, info.rescale("none", target))
        )
    assert info.rotary_dim and info.rope_theta
    check_fits(rescale, info.rotary_dim // 2, info.rope_theta)
    if rescale.portable:
        return rescale
    if options.drop_start_tokens:
        return rescale.replace(start_tokens=0)
    raise ValueError(
        f"start_tokens is {rescale.start_tokens} in {name}, and no checkpoint format has a field "
        f"for it; {_portable(Path(name), rescale)}use drop_start_tokens=True to export with 0"
    )


def _portable(file: Path, rescale: Rescale) -> str:
    """Return the advice to export a search's portable factors: the file beside, if there is one."""
    beside = file.with_name("portable.json")
    if not beside.exists():
        return "give the portable factors of the search, or "
    best, without = (r.provenance.get("loss") for r in (rescale, Rescale.load(beside)))
    if best is None or without is None:
        return f"give {beside}, or "
    return (
        f"give {beside}, the best factors with 0 ({without - best:+.4f} nats/token on the search "
        "windows), or "
    )


@contextlib.contextmanager
def _checkpoint(options: ExportOptions, info: ModelInfo, keep_gguf: bool) -> Iterator[Path]:
    """Yield the model to export as a directory of safetensors, or unchanged as a GGUF file.

    Raises:
        ValueError: weights are missing, or a file leads outside the model's directory.
    """
    path = local_copy(info.source)
    if path.is_dir():
        with quiet():
            config = read_pretrained(AutoConfig, str(path), options.trust_remote_code)
        check_weights(path, config, options.trust_remote_code)
        kept_files(path)
    if path.is_dir() or keep_gguf:
        yield path
        return
    with scratch_directory(options.out) as directory:
        execution = ExecutionConfig.make(
            {
                "device": "cpu",
                "dtype": options.dtype,
                "trust_remote_code": options.trust_remote_code,
            }
        )
        loaded = load_model(info.source, execution, info=info)
        with quiet():
            loaded.model.save_pretrained(directory)
            loaded.tokenizer.save_pretrained(directory)
        apply_umask(directory)  # an export may link to them
        del loaded
        yield directory


def _results(run: Path | None) -> dict[str, Any] | None:
    """Return the results of a run for the model card of its export, if it was evaluated."""
    if run and (run / "results.json").exists():
        return read_json(run / "results.json")
    return None


def _card_file(out: Path) -> Path:
    file = out.suffix == ".gguf" and not out.is_dir()
    return out.with_suffix(".md") if file else out / "README.md"
