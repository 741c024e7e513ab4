"""The Python API on models in memory: search, measure, load, extend, export, verify.

Each function checks its arguments, calls one function of a package, and returns plain values. The
processes of a torchrun launch are found in the environment, as in accelerate.
"""

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig

from longrope.checkpoints.export import ExportOptions
from longrope.checkpoints.export import export as export_checkpoint
from longrope.checkpoints.hf import scaled_config
from longrope.checkpoints.in_memory import saved_model
from longrope.checkpoints.manifest import Manifest
from longrope.data.documents import documents_of
from longrope.data.encoding import bos_tokens
from longrope.data.windows import pack as join
from longrope.data.windows import tokenize
from longrope.distributed import Ranks, ranks
from longrope.engines.check import Reference, Verdict
from longrope.engines.check import verify as verify_export
from longrope.engines.specs import require_engine
from longrope.errors import shortened
from longrope.evaluate.cache import MeasurementCache
from longrope.evaluate.compare import perplexity_row, resolve_lengths
from longrope.evaluate.measure import Measurement, measure_all, model_identity
from longrope.evaluate.settings import PerplexityConfig
from longrope.execution import ExecutionConfig
from longrope.files.atomic import require_directory
from longrope.inference.load import inspect_to_measure, load_extended
from longrope.models.info import ScalingChoice, inspect_model, without_adapters
from longrope.models.load import LoadedModel, load_model, long_forward, wrap_model
from longrope.models.sources import read_pretrained
from longrope.pipeline.extend import extend as run_extension
from longrope.pipeline.recipe import Recipe, load_recipe, make_recipe
from longrope.rope.apply import rescaled
from longrope.rope.own_scaling import own_rescale
from longrope.rope.rescale import Rescale
from longrope.rope.switch import Applied, apply_pair, without_rescales
from longrope.search.evaluator import SearchResult
from longrope.search.history import require_search_directory
from longrope.search.run import SearchOptions, search_documents
from longrope.search.settings import EvolutionSearchConfig, GradientSearchConfig

# Keys of a config that an export changes.
_SCALED = ("rope_parameters", "max_position_embeddings", "original_max_position_embeddings")


def search_factors(
    model: Any,
    tokenizer: Any = None,
    *,
    target_length: int | str,
    texts: Any,
    output_dir: str | Path,
    config: GradientSearchConfig | EvolutionSearchConfig | None = None,
    seed: int = 0,
    attention_factor: float | None = None,
    start_tokens: int | None = None,
    pack: bool = False,
    field: str = "text",
    rope_scaling: ScalingChoice | None = None,
    original_length: int | None = None,
    execution: ExecutionConfig | None = None,
) -> SearchResult:
    """Python API of ``longrope search``: search the rescale factors of a model, or resume.

    Args:
        model: a transformers model in memory (also in PEFT's wrapper), or a directory, hub id or
            GGUF file.
        tokenizer: the model's; not needed with a path.
        target_length: tokens, or such as ``"128k"`` or ``"8x"``.
        texts: a list of strings, a ``datasets.Dataset``, or paths.
        output_dir: directory of the search: ``rescale.json``, ``portable.json``,
            ``history.jsonl``. The same call resumes an interrupted search.
        config: :class:`GradientSearchConfig` (the default) or :class:`EvolutionSearchConfig`.
        seed: random seed of windows and candidates.
        attention_factor: of every candidate; by default √(1 + ln s / ln L).
        start_tokens: a fixed n̂; searched by default.
        pack: join texts into windows, with BOS and EOS between them.
        field: text field of a dataset or of JSON files.

    Returns:
        The best rescale in ``best``, the best that engines can load in ``portable``.

    Raises:
        ValueError: a model that cannot be extended, too little text, or a directory that holds
            another search.

    Example:
        >>> import tempfile
        >>> import longrope
        >>> from longrope import GradientSearchConfig
        >>> result = longrope.search_factors(
        ...     "bundled", target_length="2x", texts="python-library", pack=True,
        ...     output_dir=tempfile.mkdtemp(), config=GradientSearchConfig(windows=1, budget=4),
        ... )
        >>> result.best.max_position_embeddings
        512
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("search_factors computes gradients: call it outside torch.inference_mode")
    options = SearchOptions(
        target=str(target_length),
        out=Path(output_dir),
        pack=pack,
        attention_factor=attention_factor,
        start_tokens=start_tokens,
        seed=seed,
        config=config or GradientSearchConfig(),
    )
    require_directory(options.out)
    require_search_directory(options.out)
    choice = {"rope_scaling": rope_scaling, "original_length": original_length}
    with _prepared(model, tokenizer, execution, choice) as (loaded, these, applied):
        if applied.pair and rope_scaling != "replace":
            raise ValueError(
                "model has the factors of its extension; to extend it further, give the path of "
                "its checkpoint with rope_scaling='keep', or search anew from its original length "
                "with rope_scaling='replace'"
            )
        documents = tokenize(documents_of(texts, field), loaded.tokenizer)
        return search_documents(loaded, documents, options, these)


def token_losses(
    model: Any, input_ids: Tensor, *, execution: ExecutionConfig | None = None
) -> Tensor:
    """Python API to score tokens: the loss of every token, by the long forward pass.

    Args:
        model: a transformers model in memory, with or without factors applied.
        input_ids: token ids, shape (batch, tokens).

    Returns:
        Losses in nats, shape (batch, tokens − 1), float32 on the CPU.

    Raises:
        ValueError: the model's layers cannot run one after the other, or are not in memory.

    Example:
        >>> import torch
        >>> import longrope
        >>> loaded = longrope.load_model("bundled")
        >>> longrope.token_losses(loaded.model, torch.arange(3, 300)[None]).shape
        torch.Size([1, 296])
    """
    base = without_adapters(model)
    with (
        _evaluating(base),
        without_rescales(base) as applied,
        rescaled(base, applied.at(input_ids.shape[1])),
    ):
        return long_forward(base, execution or ExecutionConfig()).losses(input_ids)


def perplexity(
    model: Any,
    tokenizer: Any = None,
    texts: Any = (),
    *,
    lengths: Sequence[int | str],
    rescale: Rescale | None = None,
    tokens_per_document: int | None = None,
    pack: bool = False,
    field: str = "text",
    rope_scaling: ScalingChoice | None = None,
    original_length: int | None = None,
    execution: ExecutionConfig | None = None,
) -> list[dict[str, Any]]:
    """Python API of ``longrope evaluate perplexity``: the same tokens at every length.

    Args:
        model: as of :func:`search_factors`; also a run of :func:`extend` or an export.
        texts: a list of strings, a ``datasets.Dataset``, or paths; each text at least as long as
            the longest length.
        lengths: window lengths in tokens, or such as ``"8k"`` or ``"2x"``.
        rescale: factors to measure under; by default those that the model has.
        tokens_per_document: tokens to score per document; by default all.
        pack: join texts into one, with BOS and EOS between them.

    Returns:
        A row per length with ``length``, ``perplexity``, ``standard_error``, ``tokens`` and
        ``windows``, as ``longrope evaluate perplexity --json`` prints it.

    Raises:
        ValueError: too little text, or lengths that cannot be scored together.

    Example:
        >>> import longrope
        >>> rows = longrope.perplexity(
        ...     "bundled", texts="python-library-held-out", lengths=[256], tokens_per_document=256
        ... )
        >>> rows[0]["perplexity"] < 20
        True
    """
    if isinstance(lengths, str | int):
        raise ValueError(f"lengths is {lengths!r}; give a list, such as [{lengths!r}]")
    choice = {"rope_scaling": rope_scaling, "original_length": original_length}
    prepared = _prepared(model, tokenizer, execution, choice, as_it_is=rescale is None)
    with prepared as (loaded, _, applied):
        info = loaded.info
        measured, _ = resolve_lengths(info, tuple(map(str, lengths)), None)
        config = PerplexityConfig.make(
            {"lengths": tuple(measured), "tokens_per_document": tokens_per_document}
        )
        documents = tokenize(documents_of(texts, field), loaded.tokenizer)
        if pack:
            bos, eos = bos_tokens(loaded.tokenizer), loaded.tokenizer.eos_token_id
            documents = [join(documents, bos, eos)]
        searched = set(rescale.searched_documents) if rescale else set()
        if any(searched & set(document.sha256) for document in documents):
            log.warning("some of the texts were used by the search for these factors")
        original = info.original_max_position_embeddings or 0
        unscaled = info.rescale("none", max(*measured, original))
        factors = {length: rescale or applied.at(length) or unscaled for length in measured}
        identity = model_identity(loaded)
        wanted = [
            Measurement(
                "perplexity", identity, lambda _, n=length: factors[n], length, config, documents
            )
            for length in measured
        ]
        name = factors[measured[-1]].provenance.get("method", "rescale")
        found = measure_all(loaded, wanted, MeasurementCache())
        return [perplexity_row(name, scores, original) for scores in found]


def from_pretrained(
    source: str | Path,
    *,
    device: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Any:
    """Python API to load an extended model as a transformers model, ready to generate.

    Every call uses the right factors: each row of a batch gets short factors up to the boundary
    and long ones beyond it, also while ``generate()`` crosses it, and n̂ is applied.
    ``transformers.pipeline`` works. What ``save_pretrained`` writes is for transformers 5;
    :func:`export` also writes for version 4 and for engines.

    Args:
        source: a run of ``longrope extend``, or a checkpoint with longrope factors.
        device: such as ``"cuda:1"``; by default a GPU if there is one.
        dtype: ``"auto"`` (the checkpoint's), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        A ``PreTrainedModel`` in evaluation mode.

    Raises:
        ValueError: no such model, or one without factors of its own.
    """
    options = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    loaded, pair = load_extended(str(source), ExecutionConfig.make(options))
    if pair is None:
        raise ValueError(
            f"source is {str(source)!r}, which has no factors of its own: give a run of longrope "
            "extend, or apply factors with longrope.apply_rescale"
        )
    apply_pair(loaded.model, pair)
    # The model was loaded without its scaling; what is saved from it must have it.
    config = loaded.model.config.get_text_config()
    if loaded.info.source.endswith(".gguf"):
        exported = scaled_config(config.to_dict(), pair, config)
    else:
        exported = read_pretrained(AutoConfig, loaded.info.source, trust_remote_code)
        exported = exported.get_text_config().to_dict()
    config.update({name: exported[name] for name in _SCALED if name in exported})
    return loaded.model


def extend(
    model: str | Path | None = None,
    *,
    target_length: int | str | None = None,
    data: Sequence[str | Path] | str | Path = (),
    output_dir: str | Path,
    effort: Literal["quick", "standard", "paper"] | None = None,
    recipe: Recipe | Mapping[str, Any] | str | None = None,
) -> Path:
    """Python API of ``longrope extend``: run every stage of an extension, or resume it.

    The same call resumes an interrupted run.

    Args:
        model: a directory, hub id or GGUF file (save a model in memory first); by default the
            recipe's.
        target_length: tokens, or such as ``"512k"`` or ``"64x"``; by default the recipe's.
        data: files, directories or datasets; by default the recipe's.
        output_dir: the run's directory.
        effort: chooses every setting that the recipe does not give; by default ``"standard"``.
        recipe: a :class:`Recipe`, its keys and values, a YAML file, or the name of a shipped one.

    Returns:
        ``output_dir``, which :func:`from_pretrained` loads and :func:`export` exports.

    Raises:
        ValueError: the recipe cannot work, memory or text is too small, or the directory holds
            another run.
    """
    if not isinstance(model, str | Path | None):
        raise ValueError(
            f"model is a {type(model).__name__} in memory, and an extension reads a checkpoint: "
            "save it with model.save_pretrained(DIR) and tokenizer.save_pretrained(DIR), and give "
            "DIR"
        )
    sources = [data] if isinstance(data, str | Path) else list(data)
    for source in sources:
        if not isinstance(source, str | Path) or len(str(source)) > 1024 or "\n" in str(source):
            raise ValueError(
                f"data has {shortened(source)}, which is no path; write the texts to files, such "
                "as one of JSON lines, and give that"
            )
    given: dict[str, Any] = {
        "model": None if model is None else str(model),
        "target": None if target_length is None else str(target_length),
        "data": tuple(map(str, sources)) or None,
        "effort": effort,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(recipe, str):
        chosen = load_recipe(recipe, **given)
    else:
        content = recipe.given() if isinstance(recipe, Recipe) else dict(recipe or {})
        chosen = make_recipe(content | given)
    with ranks(chosen.execution.sequence_parallel) as these:
        run_extension(chosen, Path(output_dir), these)
    return Path(output_dir)


def export(
    model: Any,
    output: str | Path,
    *,
    tokenizer: Any = None,
    format: str = "hf",
    long_factors: str | Path | Rescale | None = None,
    short_factors: str | Path | Rescale | None = None,
    **options: Any,
) -> Manifest:
    """Python API of ``longrope export``: write a format that an inference engine loads.

    Args:
        model: a run of ``longrope extend``, a checkpoint or GGUF file, or a model in memory.
        output: directory to write; a ``.gguf`` file for GGUF formats.
        tokenizer: of a model in memory.
        format: ``"hf"``, ``"hf-static"``, ``"gguf"`` or ``"gguf-static"``.
        long_factors: a rescale, its file, or a method; not needed for a run or an export.
        short_factors: factors for short sequences; without them the long serve every length.
        options: further fields of :class:`longrope.checkpoints.export.ExportOptions`, such as
            ``target`` and ``force``.

    Raises:
        ValueError: a format that cannot express the factors, or an ``output`` that exists.

    Example:
        >>> import tempfile
        >>> import longrope
        >>> loaded = longrope.load_model("bundled")
        >>> manifest = longrope.export(
        ...     loaded.model, tempfile.mkdtemp() + "/yarn", tokenizer=loaded.tokenizer,
        ...     long_factors=longrope.methods.yarn(loaded.info, target_length="8x"),
        ... )
        >>> manifest.pair.long.max_position_embeddings
        2048
    """
    names = {field.name for field in dataclasses.fields(ExportOptions)}
    if unknown := sorted(set(options) - names):
        raise ValueError(f"no option {unknown[0]!r}; there are {', '.join(sorted(names))}")
    options["format"], output = format, Path(output)
    with contextlib.ExitStack() as stack:
        for name, factors in (("long_factors", long_factors), ("short_factors", short_factors)):
            if isinstance(factors, Rescale):
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                factors.save(folder / f"{name}.json")
                options[name] = str(folder / f"{name}.json")
            elif factors is not None:
                options[name] = str(factors)
        if not isinstance(model, str | Path):
            model = stack.enter_context(saved_model(model, tokenizer, output))
        return export_checkpoint(ExportOptions(str(model), output, **options))


def verify(
    path: str | Path,
    *,
    engine: str = "transformers",
    engine_python: str | None = None,
    source: str | Path | None = None,
    lengths: Sequence[int] = (),
    prompts: int = 2,
    execution: ExecutionConfig | None = None,
) -> Verdict:
    """Python API of ``longrope verify``: check which factors an inference engine applies.

    Args:
        path: what :func:`export` wrote.
        engine: ``"transformers"``, ``"transformers-legacy"``, ``"vllm"``, ``"llamacpp"`` or
            ``"mlx"``.
        engine_python: the Python of the engine's own environment.
        source: the model or run that was exported, to compare with its weights; by default with
            the export's own.
        lengths: tokens of the prompts; by default around the boundary and deep.
        prompts: prompts at each length.

    Returns:
        A verdict; ``right`` says whether the engine applies the exported factors.

    Raises:
        ValueError: an engine that is not there, or a model without factors.
    """
    require_engine(str(path), engine, engine_python)
    reference = Reference(str(path), execution, None if source is None else str(source))
    return verify_export(
        reference, engine, engine_python=engine_python, lengths=tuple(lengths), prompts=prompts
    )


log = logging.getLogger(__name__)


@contextlib.contextmanager
def _prepared(
    model: Any,
    tokenizer: Any,
    execution: ExecutionConfig | None,
    choice: dict[str, Any],
    *,
    as_it_is: bool = False,
) -> Iterator[tuple[LoadedModel, Ranks, Applied]]:
    """Load the model of an API call, or verify the one in memory; join the launch's processes.

    The factors that are applied to the model are taken out for the ``with`` block and returned.

    Args:
        choice: ``rope_scaling`` and ``original_length``.
        as_it_is: the model is to be measured under its own scaling, if it has any.
    """
    execution = execution or ExecutionConfig()
    with ranks(execution.sequence_parallel) as these:
        if isinstance(model, str | Path):
            source, info, pair = str(model), None, None
            if as_it_is:
                trusted = execution.trust_remote_code
                info, pair = inspect_to_measure(source, trust_remote_code=trusted, **choice)
                source, choice = info.source, {}
            loaded = load_model(source, execution, group=these.group, info=info, **choice)
            yield loaded, these, Applied(pair)
            return
        if tokenizer is None:
            raise ValueError("tokenizer is missing; give the tokenizer of the model in memory")
        base = without_adapters(model)
        with _evaluating(base), without_rescales(base) as applied:
            unscaled = applied.pair is not None
            if applied.pair:
                length = choice["original_length"]
                length = length or applied.pair.long.original_max_position_embeddings
                choice = {"original_length": length}
            elif as_it_is and choice["rope_scaling"] is None:
                unscaled = own_rescale(base, 1) is not None
                if not unscaled and inspect_model(base).rope_scaling:
                    choice = choice | {"rope_scaling": "keep"}
            loaded = wrap_model(model, tokenizer, execution, loaded_unscaled=unscaled, **choice)
            yield dataclasses.replace(loaded, group=these.group), these, applied


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Put the model of an API call into evaluation mode for a ``with`` block, without autocast."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        kind = next(model.parameters()).device.type
        with torch.autocast(kind, enabled=False) if kind != "meta" else contextlib.nullcontext():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
