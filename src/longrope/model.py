"""A model from wherever it is, proved to be one that can be extended."""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from longrope.facts import Existing, ModelFacts, inspect_model
from longrope.forward import LongForward
from longrope.offload import offload as offload_layers
from longrope.parallel import Team
from longrope.probe import reach, why_not
from longrope.rope.site import find_rotary
from longrope.skeleton import auto_class, skeleton, unscaled
from longrope.source import quiet, read_pretrained
from longrope.waiting import names_folder, say_if_in_memory

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer, and its facts.

    ``offloaded``: its layers are on the device only while they work (:mod:`longrope.offload`).
    ``team``: the processes that share every sequence.
    """

    model: Any
    tokenizer: Any
    facts: ModelFacts
    offloaded: bool = False
    team: Team = dataclasses.field(default_factory=Team)

    def forward(self, chunk: int | None = None, hidden_device: str | None = None) -> LongForward:
        """Its long forward.

        Raises:
            ValueError: no such device on this machine, or no such folder.
        """
        hidden = find_waiting("--hidden-device", hidden_device) if hidden_device else None
        return LongForward(self.model, chunk, hidden, offloaded=self.offloaded, team=self.team)

    def fingerprint(self) -> str:
        """A hash of a sample of every weight: tells one model from another."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 256)].float().cpu().numpy()
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.tobytes())
        return digest.hexdigest()


def load_model(
    source: str = "bundled",
    *,
    device: str | None = None,
    dtype: str = "auto",
    offload: str | None = None,
    team: Team | None = None,
    existing_scaling: Existing | None = None,
    original_length: int | None = None,
    trust_remote_code: bool = False,
    check: Callable[[ModelFacts], None] = lambda facts: None,
) -> LoadedModel:
    """Load a model that longrope can extend, and prove on it that it can.

    Args:
        source: a local directory, a hub id, a GGUF file (it is dequantised), or
            ``"bundled"`` for the small model in the package.
        device: such as ``"cuda:1"``; a GPU where there is one by default.
        dtype: ``"auto"`` (the checkpoint's), ``"float32"``, ``"bfloat16"``, ``"float16"``.
        offload: ``"weights"`` leaves the layers' weights on the host, two layers at a time on
            the device; in the checkpoint's dtype the host does not hold them either.
        team: the processes that share every sequence of a long forward.
        existing_scaling: what to do with scaling that the model already has.
        check: called with the facts before any weight is read; may refuse.

    Raises:
        ValueError: no such model, or one that cannot be extended, with the reason;
            a model without RoPE is refused before its weights are read.
    """
    if offload not in (None, "weights"):
        raise ValueError(f"--offload {offload}: there is only weights")
    options: dict[str, Any] = {"dtype": _dtype(dtype), "use_safetensors": True}
    facts = inspect_model(
        source,
        existing_scaling=existing_scaling,
        original_length=original_length,
        trust_remote_code=trust_remote_code,
    )
    _refuse(facts, facts.reason)
    if team and team.size > 1 and facts.attention_layers < facts.layers:
        raise ValueError(
            f"--sequence-parallel {team.size}: layers of {facts.architecture} go on from a state "
            "of all tokens before, so that processes cannot share a sequence; leave it out"
        )
    check(facts)
    where = find_device("--device", device)
    tokenizer = load_tokenizer(source, trust_remote_code)
    with quiet():
        config = read_pretrained(AutoConfig, source, trust_remote_code)
        if facts.existing_scaling and existing_scaling == "replace":
            site = find_rotary(skeleton(source, config, trust_remote_code)[0])
            options["config"] = unscaled(config, site.layer_type if site else None)
        model = read_pretrained(auto_class(config), source, trust_remote_code, **options)
    model.eval()
    if offload:
        offload_layers(model, where)
    else:
        model.to(where)
    assert facts.original_max_position_embeddings
    _refuse(facts, why_not(model, facts.rescale("none", facts.original_max_position_embeddings)))
    return LoadedModel(model, tokenizer, facts, offload is not None, team or Team())


def warn_if_out_of_reach(loaded: LoadedModel, target: int) -> None:
    """Say so of a model that no rescale makes more far-sighted: see :func:`reach`."""
    facts = loaded.facts
    window = reach(loaded.model, facts.rescale("none", target))
    if window is not None and window < target:
        log.warning(
            "%s: its RoPE turns only in layers that see the last %s tokens; no factors make it see "
            "further (what may: docs/method.md)",
            facts.source,
            f"{window:,}",
        )


def _refuse(facts: ModelFacts, reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f"{facts.source} ({facts.architecture}) cannot be extended: {reason}")


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """A model's tokenizer alone.

    Raises:
        ValueError: it cannot be read, or there is none.
    """
    directory = Path(source)
    files = [
        f for kind in ("*token*", "vocab*", "*.model", "tekken*") for f in directory.glob(kind)
    ]
    if directory.is_dir() and not files:
        raise ValueError(
            f"{source}: has no tokenizer (tokenizer.json and the like); copy those of the model "
            "that it was made from there"
        )
    with quiet():
        return read_pretrained(AutoTokenizer, source, trust_remote_code)


def find_device(option: str, name: str | None) -> torch.device:
    """A device by name; a GPU where there is one if no name is given.

    Raises:
        ValueError: no such device on this machine; names ``option``.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{option} {name}: not on this machine ({first})") from None
    return device


def find_waiting(option: str, name: str) -> torch.device | Path:
    """Where hidden states wait: a device by name, or a folder that files can be made in.

    Raises:
        ValueError: neither; names ``option``.
    """
    if not names_folder(name):
        return find_device(option, name)
    folder = Path(name).expanduser()
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{option} {name}: no device, and no folder that can be written")
    say_if_in_memory(folder)
    return folder


def _dtype(name: str) -> Any:
    if name == "auto":
        return "auto"
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in kinds:
        raise ValueError(f"--dtype {name}: choose auto, {', '.join(kinds)}")
    return kinds[name]
