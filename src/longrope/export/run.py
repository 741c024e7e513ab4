"""``longrope export``: an extended model in the form that an engine applies."""

import contextlib
import dataclasses
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from longrope.export import card
from longrope.export.fold import largest_difference, tensor_names, why_not_foldable
from longrope.export.gguf import export_gguf
from longrope.export.huggingface import export_directory
from longrope.export.intent import FORMATS, Format, Intent
from longrope.facts import ModelFacts, inspect_model, load_rescale
from longrope.files import write_atomically
from longrope.generate import is_run, original_of
from longrope.model import load_model
from longrope.rope.install import check_fits, installed
from longrope.rope.methods import METHODS
from longrope.rope.rescale import Rescale, default_attention_factor
from longrope.rope.switch import Pair
from longrope.source import local_copy, quiet
from longrope.windows import parse_extension

log = logging.getLogger(__name__)
AttentionFactors = Literal["auto", "fold", "field"]
_SAME = 1e-6  # attention factors that engines compute are float32
# A folded model may differ by this share of what leaving the factor out would change.
_TOLERANCE = 0.1
_PROBE_TOKENS = 48


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What to export, and how.

    Args:
        model: a run of ``longrope extend``, a checkpoint, a hub id, or a GGUF file.
        rescale, short: rescale files, CSV files or methods' names; a run has its own. Without
            ``short`` the long factors serve every length.
        target: what a method or a CSV is made for.
        attention_factors: where engines would compute another attention factor than the
            rescale's: ``fold`` the rest into the query projections, leave it in ``field``s of
            the config that some engines read, or ``auto``: fold where the model allows it.
        drop_start_tokens: export factors that were searched with n̂ > 0 as if it were 0.
        force: replace what is at ``out``.
    """

    model: str
    out: Path
    format: Format = "hf"
    rescale: str | None = None
    short: str | None = None
    target: str | None = None
    attention_factors: AttentionFactors = "auto"
    drop_start_tokens: bool = False
    original_length: int | None = None
    dtype: str = "bfloat16"
    force: bool = False
    trust_remote_code: bool = False


def export(options: ExportOptions) -> Intent:
    """Write the export; gives what it was meant to be.

    Raises:
        ValueError: anything that would make an engine compute something else, or an ``out``
            that exists; nothing is left at ``out`` then.
    """
    if options.format not in FORMATS:
        raise ValueError(f"--format {options.format}: choose {', '.join(FORMATS)}")
    if options.attention_factors not in ("auto", "fold", "field"):
        raise ValueError(
            f"--attention-factors {options.attention_factors}: choose auto, fold or field"
        )
    if options.out.exists() and not options.force:
        raise ValueError(f"{options.out}: is there already; give another --out, or --force")
    gguf = options.format.startswith("gguf")
    if gguf and options.out.suffix != ".gguf":
        raise ValueError(f"--out {options.out}: the name of a GGUF file ends in .gguf")
    run = Path(options.model) if is_run(Path(options.model)) else None
    model = str(run / "model") if run else options.model
    pair = _pair(options, run, model)
    named = str((original_of(options.model) or {}).get("source", options.model))
    intent = Intent(options.format, Path(named).name, pair)
    with _checkpoint(options, model, keep_gguf=gguf) as source:
        if gguf:
            export_gguf(source, intent, options.out)
        else:
            intent = _with_attention_factor(intent, source, options.attention_factors)
            export_directory(
                source,
                intent,
                options.out,
                check=None if intent.folded is None else _folding_check(intent, source, options),
                trust_remote_code=options.trust_remote_code,
            )
    _write_card(intent, options.out, None if options.rescale or options.short else run)
    return intent


def _pair(options: ExportOptions, run: Path | None, model: str) -> Pair:
    named = options.rescale or (str(run / "rescale.json") if run else None)
    short_named = options.short or (
        str(run / "short.json") if run and not options.rescale else None
    )
    if named is None:
        raise ValueError("--rescale is missing: give a rescale file, or a run as MODEL")
    facts = inspect_model(
        model,
        existing_scaling="replace",
        original_length=options.original_length,
        trust_remote_code=options.trust_remote_code,
    )
    if not facts.extendable:
        raise ValueError(f"{model} cannot be exported: {facts.reason}")
    long = _rescale(named, facts, options)
    short = _rescale(short_named, facts, options) if short_named else None
    if short is None:
        short = long.replace(max_position_embeddings=long.original_max_position_embeddings)
    for rescale in (short, long):
        assert facts.rotary_dim and facts.rope_theta
        check_fits(rescale, facts.rotary_dim // 2, facts.rope_theta)
    if short.attention_factor != long.attention_factor:
        raise ValueError(
            f"attention_factor is {short.attention_factor:g} in --short and "
            f"{long.attention_factor:g} in --rescale; a checkpoint holds one for both: search the "
            "short factors under the long ones'"
        )
    return Pair(short, long)


def _rescale(name: str, facts: ModelFacts, options: ExportOptions) -> Rescale:
    made = name in METHODS or Path(name).suffix == ".csv"
    if made and options.target is None:
        raise ValueError(f"--target is missing; say what {name} is made for, such as 32k")
    target = parse_extension(options.target, facts) if made and options.target else 0
    if name in METHODS:
        return facts.rescale(name, target)
    rescale = load_rescale(name, facts, target)
    if rescale.portable:
        return rescale
    if options.drop_start_tokens:
        return rescale.replace(start_tokens=0)
    raise ValueError(
        f"start_tokens is {rescale.start_tokens} in {name}, and no checkpoint format can say it"
        f"{_cost_of_none(Path(name), rescale)}; --drop-start-tokens exports them as if it were 0"
    )


def _cost_of_none(file: Path, rescale: Rescale) -> str:
    """What the same search found without start tokens, where it lies beside."""
    beside = file.with_name("portable.json")
    if not beside.exists():
        return ""
    best, without = (r.provenance.get("loss") for r in (rescale, Rescale.load(beside)))
    if best is None or without is None:
        return ""
    return (
        f": give {beside}, the best without, which costs {without - best:.4f} nats a token on the "
        "search's windows"
    )


def _with_attention_factor(intent: Intent, source: Path, how: AttentionFactors) -> Intent:
    """Settle how engines that do not read ``attention_factor`` come to it."""
    written = intent.written
    theirs = default_attention_factor(written.recovery_length, written.long.max_position_embeddings)
    ours = written.long.attention_factor
    if abs(ours - theirs) < _SAME or how == "field":
        if abs(ours - theirs) >= _SAME:
            log.warning(_FIELD, ours, theirs)
        return intent
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    layers = config.get("text_config", config)["num_hidden_layers"]
    reason = why_not_foldable(tensor_names(source), layers)
    if reason is None:
        return dataclasses.replace(intent, folded=theirs)
    if how == "fold":
        raise ValueError(
            f"--attention-factors fold: {intent.source} cannot take it: {reason}; use field"
        )
    log.warning(f"{_FIELD}; it cannot be folded into the weights: %s", ours, theirs, reason)
    return intent


_FIELD = (
    "attention_factor %.6g is in fields that transformers and vLLM read; mlx-lm and SGLang compute "
    "%.6g by themselves"
)


def _folding_check(intent: Intent, source: Path, options: ExportOptions) -> Callable[[Path], None]:
    """Hold the folded weights to the model's logits, and to what dropping the factor would do."""

    def logits(model: str, rescale: Rescale) -> torch.Tensor:
        loaded = load_model(
            model,
            device="cpu",  # in float32 a large one may fit no GPU
            dtype="float32",
            existing_scaling="replace",
            original_length=rescale.original_max_position_embeddings,
            trust_remote_code=options.trust_remote_code,
        )
        ids = torch.randint(
            0,
            loaded.facts.vocabulary,
            (1, _PROBE_TOKENS),
            generator=torch.Generator().manual_seed(0),
        ).to(loaded.model.device)
        with torch.inference_mode(), installed(loaded.model, rescale):
            return loaded.model(input_ids=ids).logits.cpu()

    def check(directory: Path) -> None:
        long, folded = intent.pair.long, intent.written.long
        expected = logits(str(source), long)
        dropped = largest_difference(logits(str(source), folded), expected)
        found = largest_difference(logits(str(directory), folded), expected)
        if found > _TOLERANCE * dropped:
            raise ValueError(
                f"attention_factor {long.attention_factor:g} folded into the query projections "
                f"changes log-probabilities by {found:.3g}, against {dropped:.3g} without it; use "
                "--attention-factors field"
            )
        log.info("folded attention factor: largest difference %.3g nats", found)

    return check


@contextlib.contextmanager
def _checkpoint(options: ExportOptions, model: str, keep_gguf: bool) -> Iterator[Path]:
    """The model as a directory of safetensors (or the GGUF file itself), wherever it is."""
    path = local_copy(model)
    if path.is_dir() or keep_gguf:
        yield path
        return
    with tempfile.TemporaryDirectory(dir=_existing(options.out.parent)) as directory:
        loaded = load_model(
            model,
            device="cpu",
            dtype=options.dtype,
            existing_scaling="replace",
            original_length=options.original_length,
            trust_remote_code=options.trust_remote_code,
        )
        with quiet():
            loaded.model.save_pretrained(directory)
            loaded.tokenizer.save_pretrained(directory)
        del loaded
        yield Path(directory)


def _existing(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _write_card(intent: Intent, out: Path, run: Path | None) -> None:
    results: dict[str, Any] | None = None
    if run and (run / "results.json").exists():
        results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    file = out / "README.md" if out.is_dir() else out.with_suffix(".md")
    write_atomically(file, card.write(intent, results))
