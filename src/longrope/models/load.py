"""A model from wherever it is, proved to be one that can be extended."""

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from longrope.compat import auto_class
from longrope.distributed import SequenceParallelGroup
from longrope.layerwise.forward import LongForward
from longrope.layerwise.offload import offload as offload_layers
from longrope.models.compatibility import incompatibility
from longrope.models.devices import find_device, find_offload_target
from longrope.models.info import Existing, ModelInfo, inspect_model
from longrope.models.meta import build_meta_model, unscaled
from longrope.models.sources import read_pretrained
from longrope.progress import quiet
from longrope.rope.rotary import find_rotary

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer, and its facts.

    ``offloaded``: its layers are on the device only while they work.
    ``group``: the processes that share every sequence.
    """

    model: Any
    tokenizer: Any
    info: ModelInfo
    offloaded: bool = False
    group: SequenceParallelGroup = dataclasses.field(default_factory=SequenceParallelGroup)

    def forward(
        self, chunk: int | None = None, offload_activations: str | None = None
    ) -> LongForward:
        """Its long forward.

        Raises:
            ValueError: no such device on this machine, or no such folder.
        """
        hidden = (
            find_offload_target("--offload-activations", offload_activations)
            if offload_activations
            else None
        )
        return LongForward(self.model, chunk, hidden, offloaded=self.offloaded, group=self.group)

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
    group: SequenceParallelGroup | None = None,
    existing_scaling: Existing | None = None,
    original_length: int | None = None,
    trust_remote_code: bool = False,
    check: Callable[[ModelInfo], None] = lambda info: None,
) -> LoadedModel:
    """Load a model that longrope can extend, and prove on it that it can.

    Args:
        source: a local directory, a hub id, a GGUF file (it is dequantised), or
            ``"bundled"`` for the small model in the package.
        device: such as ``"cuda:1"``; a GPU where there is one by default.
        dtype: ``"auto"`` (the checkpoint's), ``"float32"``, ``"bfloat16"``, ``"float16"``.
        offload: ``"weights"`` leaves the layers' weights on the host, two layers at a time on
            the device; in the checkpoint's dtype the host does not hold them either.
        group: the processes that share every sequence of a long forward.
        existing_scaling: what to do with scaling that the model already has.
        check: called with the facts before any weight is read; may refuse.

    Raises:
        ValueError: no such model, or one that cannot be extended, with the reason;
            a model without RoPE is refused before its weights are read.
    """
    if offload not in (None, "weights"):
        raise ValueError(f"--offload {offload}: there is only weights")
    options: dict[str, Any] = {"dtype": _dtype(dtype), "use_safetensors": True}
    info = inspect_model(
        source,
        existing_scaling=existing_scaling,
        original_length=original_length,
        trust_remote_code=trust_remote_code,
    )
    _refuse(info, info.reason)
    if group and group.size > 1 and info.attention_layers < info.layers:
        raise ValueError(
            f"--sequence-parallel {group.size}: layers of {info.architecture} go on from a state "
            "of all tokens before, so that processes cannot share a sequence; leave it out"
        )
    check(info)
    where = find_device("--device", device)
    tokenizer = load_tokenizer(source, trust_remote_code)
    with quiet():
        config = read_pretrained(AutoConfig, source, trust_remote_code)
        if info.existing_scaling and existing_scaling == "replace":
            site = find_rotary(build_meta_model(source, config, trust_remote_code)[0])
            options["config"] = unscaled(config, site.layer_type if site else None)
        model = read_pretrained(auto_class(config), source, trust_remote_code, **options)
    model.eval()
    if offload:
        offload_layers(model, where)
    else:
        model.to(where)
    assert info.original_max_position_embeddings
    _refuse(
        info, incompatibility(model, info.rescale("none", info.original_max_position_embeddings))
    )
    return LoadedModel(
        model, tokenizer, info, offload is not None, group or SequenceParallelGroup()
    )


def _refuse(info: ModelInfo, reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f"{info.source} ({info.architecture}) cannot be extended: {reason}")


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


def _dtype(name: str) -> Any:
    if name == "auto":
        return "auto"
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in kinds:
        raise ValueError(f"--dtype {name}: choose auto, {', '.join(kinds)}")
    return kinds[name]
