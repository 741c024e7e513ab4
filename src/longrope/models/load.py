"""Load a model, and verify on its weights that it can be extended."""

import dataclasses
import hashlib
import logging
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
from longrope.models.info import ModelInfo, ScalingChoice, inspect_model
from longrope.models.meta import unscaled
from longrope.models.sources import read_pretrained
from longrope.progress import quiet

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer, and its :class:`ModelInfo`.

    Args:
        offloaded: the weights of a layer are on the device only while it computes.
        group: the sequence-parallel group.
    """

    model: Any
    tokenizer: Any
    info: ModelInfo
    offloaded: bool = False
    group: SequenceParallelGroup = dataclasses.field(default_factory=SequenceParallelGroup)

    def forward(
        self, chunk: int | None = None, offload_activations: str | None = None
    ) -> LongForward:
        """Return the layer-by-layer forward pass of this model.

        Args:
            chunk: tokens that go through a layer at a time.
            offload_activations: device or directory that hidden states are offloaded to.

        Raises:
            ValueError: no such device on this machine, or no such directory.
        """
        hidden = (
            find_offload_target("offload_activations", offload_activations)
            if offload_activations
            else None
        )
        return LongForward(self.model, chunk, hidden, offloaded=self.offloaded, group=self.group)

    def fingerprint(self) -> str:
        """Return the fingerprint of a loaded model: a hash of a sample of every weight."""
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
    info: ModelInfo | None = None,
    existing_scaling: ScalingChoice | None = None,
    original_length: int | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model, and verify on its weights that longrope can extend it.

    Args:
        source: a local directory, a hub id, a GGUF file (it is dequantised), or
            ``"bundled"`` for the small model in the package.
        device: such as ``"cuda:1"``; by default a GPU if there is one.
        dtype: ``"auto"`` (the checkpoint's), ``"float32"``, ``"bfloat16"``, ``"float16"``.
        offload: ``"weights"`` keeps the layers' weights on the host, two layers at a time on
            the device; in the checkpoint's dtype they stay in the memory-mapped files.
        group: the sequence-parallel group.
        info: what :func:`inspect_model` returned for this source; without it the model is
            inspected here, with ``existing_scaling`` and ``original_length``.
        existing_scaling: as in :func:`inspect_model`.
        original_length: as in :func:`inspect_model`.
        trust_remote_code: run code that comes with the model.

    Raises:
        ValueError: no such model, or one that cannot be extended, with the reason. What the
            config shows is refused before any weight is read.
    """
    if offload not in (None, "weights"):
        raise ValueError(f"offload is {offload!r}; the only choice is weights")
    options: dict[str, Any] = {"dtype": _dtype(dtype), "use_safetensors": True}
    if info is None:
        info = inspect_model(
            source,
            existing_scaling=existing_scaling,
            original_length=original_length,
            trust_remote_code=trust_remote_code,
        )
    info.require_extendable()
    if group and group.size > 1 and info.attention_layers < info.layers:
        raise ValueError(
            f"sequence_parallel is {group.size}: recurrent layers of {info.architecture} need all "
            "previous tokens, so processes cannot share a sequence; leave it out"
        )
    where = find_device("device", device)
    tokenizer = load_tokenizer(source, trust_remote_code)
    with quiet():
        config = read_pretrained(AutoConfig, source, trust_remote_code)
        if info.replaces_scaling:
            options["config"] = unscaled(config, info.rotary_layer_type)
        model = read_pretrained(auto_class(config), source, trust_remote_code, **options)
    model.eval()
    if offload:
        offload_layers(model, where)
    else:
        model.to(where)
    assert info.original_max_position_embeddings
    unextended = info.rescale("none", info.original_max_position_embeddings)
    dataclasses.replace(info, reason=incompatibility(model, unextended)).require_extendable()
    return LoadedModel(
        model, tokenizer, info, offload is not None, group or SequenceParallelGroup()
    )


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model.

    Raises:
        ValueError: it cannot be read, or there is none.
    """
    directory = Path(source)
    files = [
        f for kind in ("*token*", "vocab*", "*.model", "tekken*") for f in directory.glob(kind)
    ]
    if directory.is_dir() and not files:
        raise ValueError(
            f"{source}: has no tokenizer (tokenizer.json or similar); copy the tokenizer files of "
            "the original model there"
        )
    with quiet():
        return read_pretrained(AutoTokenizer, source, trust_remote_code)


def _dtype(name: str) -> Any:
    if name == "auto":
        return "auto"
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in kinds:
        raise ValueError(f"dtype is {name!r}; choose auto, {', '.join(kinds)}")
    return kinds[name]
