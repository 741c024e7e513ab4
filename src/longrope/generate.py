"""Text from an extended model: the prompt through the long forward, then token by token."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoConfig

from longrope.export.gguf import read_pair
from longrope.export.intent import Intent
from longrope.layers import cache_name
from longrope.model import LoadedModel, load_model
from longrope.rope.install import installed
from longrope.rope.rescale import Rescale
from longrope.rope.switch import Pair
from longrope.source import quiet, read_pretrained

log = logging.getLogger(__name__)


def load_extended(source: str, **options: Any) -> tuple[LoadedModel, Pair | None]:
    """A model and its pair of factors.

    Args:
        source: what ``longrope extend`` wrote, a checkpoint with ``longrope`` scaling, or
            any other model, which has no pair.
        options: as :func:`longrope.model.load_model` takes them. With ``existing_scaling`` the
            model is taken as that says, without a pair.

    Raises:
        ValueError: no such model, or one that cannot be rescaled.
    """
    if options.get("existing_scaling"):
        return load_weights(source, **options), None
    pair, run = find_pair(source, options.get("trust_remote_code", False)), Path(source)
    if pair is None:
        return load_model(source, **options), None
    if is_run(run):
        _say_if_not_exported(run, pair)
    options |= {"existing_scaling": "replace"}
    # What the checkpoint calls original is the recovery length, where its long factors begin.
    options["original_length"] = options.get("original_length") or _original_length(run, pair)
    return load_model(str(run / "model") if is_run(run) else source, **options), pair


def _say_if_not_exported(run: Path, pair: Pair) -> None:
    """A checkpoint has one attention factor for both sets; a run may have found two."""
    exported = Rescale.load(run / "short.json").attention_factor
    if exported != pair.short.attention_factor:
        log.warning(
            "up to %s tokens the attention factor is %.4g, which the run found best and only "
            "longrope applies; its checkpoint, %s, has %.4g at every length",
            f"{pair.recovery_length:,}",
            pair.short.attention_factor,
            run / "model",
            exported,
        )


def load_weights(source: str, **options: Any) -> LoadedModel:
    """A model without its pair: of a run the trained weights, unscaled unless that is to be kept.

    Args:
        options: as :func:`longrope.model.load_model` takes them.
    """
    run = Path(source)
    if is_run(run):
        source = str(run / "model")
        if options.get("existing_scaling") != "keep":
            before = Rescale.load(run / "rescale.json").original_max_position_embeddings
            told = options.get("original_length") or before
            options |= {"existing_scaling": "replace", "original_length": told}
    return load_model(source, **options)


def _original_length(source: Path, pair: Pair) -> int:
    """Tokens that a model handled before it was extended, as far as what lies there tells."""
    if is_run(source):
        return pair.long.original_max_position_embeddings
    intent = None
    if source.suffix == ".gguf":
        intent = read_pair(source)[1]
    elif source.is_dir():
        with contextlib.suppress(ValueError):  # a note that is damaged, and only tells the length
            intent = Intent.load(source)
    known = intent.pair if intent is not None and intent.describes(pair) else pair
    return known.long.original_max_position_embeddings


def find_pair(source: str, trust_remote_code: bool = False) -> Pair | None:
    """The factors that a model was extended with, by its files alone; None for any other.

    Raises:
        ValueError: no such model, or files that cannot be read.
    """
    run = Path(source)
    if is_run(run):
        pair = Pair(Rescale.load(run / "short.json"), Rescale.load(run / "rescale.json"))
        free = pair.short.provenance.get("free_attention_factor")
        if free is None:
            return pair
        # What no checkpoint can say, our own runtime can do.
        return Pair(pair.short.replace(attention_factor=free), pair.long)
    if run.is_file() and run.suffix == ".gguf":
        return read_pair(run)[0]
    with quiet():
        return Pair.from_config(read_pretrained(AutoConfig, source, trust_remote_code))


def original_of(source: str) -> dict[str, Any] | None:
    """The model that a run of ``longrope extend`` began with, as ``load_model`` takes it.

    None for anything else. Whether to trust its code is for whoever runs it to say again.
    """
    recipe = Path(source) / "recipe.yaml"
    if not (is_run(Path(source)) and recipe.exists()):
        return None
    found = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    return {
        "source": found["model"],
        "existing_scaling": found["existing_scaling"],
        "original_length": found["original_length"],
    }


def is_run(path: Path) -> bool:
    """Whether ``longrope extend`` wrote there, as far as its export."""
    return all((path / name).exists() for name in ("model", "rescale.json", "short.json"))


def stream(
    loaded: LoadedModel,
    choose: Callable[[int], Rescale] | None,
    ids: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    chunk: int | None = None,
) -> Iterator[int]:
    """New tokens as they come, until the end-of-sequence token.

    At the crossing from short factors to long ones the whole sequence goes through the model
    once again, so that every token is exactly what it would be without a cache.

    Args:
        choose: the rescale for a sequence of so many tokens: :meth:`Pair.choose`, say. None
            leaves the model as it is.
        temperature: 0 takes the likeliest token.

    Raises:
        ValueError: no prompt.
    """
    if not ids:
        raise ValueError("--prompt is empty; give some text")
    model, ids = loaded.model, list(ids)
    forward = loaded.forward(chunk)
    chance = torch.Generator().manual_seed(seed)
    stop = model.generation_config.eos_token_id
    stops = set(stop if isinstance(stop, list) else [stop])
    end = len(ids) + max_new_tokens
    while len(ids) < end:  # once, and once again at the boundary
        rescale = choose(len(ids)) if choose else None
        with installed(model, rescale):
            logits, cache = forward.prefill(torch.tensor([ids]))
            while True:
                token = _pick(logits[0], temperature, chance)
                if token in stops:
                    return
                yield token
                ids.append(token)
                if len(ids) == end or (choose and choose(len(ids)) != rescale):
                    break
                logits = _next(model, ids, cache)


@torch.inference_mode()
def _next(model: Any, ids: list[int], cache: Any) -> Tensor:
    device = next(model.parameters()).device
    new = torch.tensor([ids[-1:]], device=device)
    position = torch.tensor([[len(ids) - 1]], device=device)
    cached = {cache_name(model): cache}
    return model(input_ids=new, position_ids=position, **cached).logits[:, -1]


def _pick(logits: Tensor, temperature: float, chance: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    shares = (logits.float().cpu() / temperature).softmax(dim=-1)
    return int(torch.multinomial(shares, 1, generator=chance))


def text_of(loaded: LoadedModel, tokens: Iterator[int]) -> Iterator[str]:
    """The text of tokens as they come, whole characters only."""
    seen: list[int] = []
    shown = ""
    for token in tokens:
        seen.append(token)
        text = loaded.tokenizer.decode(seen, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
