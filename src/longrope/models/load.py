"""Load a model, and verify on its weights that it can be extended."""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from longrope.compat import auto_class
from longrope.distributed import SequenceParallelGroup, local_device
from longrope.execution import ExecutionConfig
from longrope.labels import display_name
from longrope.layerwise.forward import LongForward
from longrope.layerwise.weight_offload import offload as offload_layers
from longrope.models.compatibility import incompatibility
from longrope.models.devices import find_device, find_offload_target
from longrope.models.info import ModelInfo, ScalingChoice, inspect_model, without_adapters
from longrope.models.meta import unscaled
from longrope.models.parameters import is_tied
from longrope.models.sources import read_pretrained
from longrope.progress import announced, quiet

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer, its :class:`ModelInfo`, and how it computes.

    Args:
        group: the sequence-parallel group.
    """

    model: Any
    tokenizer: Any
    info: ModelInfo
    execution: ExecutionConfig = dataclasses.field(default_factory=ExecutionConfig)
    group: SequenceParallelGroup = dataclasses.field(default_factory=SequenceParallelGroup)

    def forward(self) -> LongForward:
        """Return the layer-by-layer forward pass of the loaded model.

        Raises:
            ValueError: no device or directory to offload hidden states to.
        """
        return long_forward(self.model, self.execution, self.group)

    def fingerprint(self) -> str:
        """Return the fingerprint of a loaded model: a hash of its weights, config and adapters."""
        config = {k: v for k, v in self.model.config.to_dict().items() if k not in _NOT_COUNTED}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        with announced("hashing the weights"):
            for name, tensor in sorted(self.model.state_dict().items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                flat = tensor.detach().cpu().contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy())
        for name, module in self.model.named_modules():  # adapters of PEFT
            if hasattr(module, "merged_adapters"):
                used = module.disable_adapters or sorted(module.active_adapters)
                scales = sorted(getattr(module, "scaling", {}).items())
                digest.update(f"{name} {used} {sorted(module.merged_adapters)} {scales}".encode())
        return digest.hexdigest()


# Fields of a config that change no loss.
_NOT_COUNTED = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}


def long_forward(
    model: Any, execution: ExecutionConfig, group: SequenceParallelGroup | None = None
) -> LongForward:
    """Make the long forward pass of a loaded model, as its execution configuration says.

    Raises:
        ValueError: no device or directory to offload hidden states to.
    """
    where = execution.offload_activations
    return LongForward(
        model,
        execution.chunk_size,
        find_offload_target(where) if where else None,
        offloaded=execution.offload_weights,
        group=group,
    )


def load_model(
    source: str = "bundled",
    execution: ExecutionConfig | None = None,
    *,
    group: SequenceParallelGroup | None = None,
    info: ModelInfo | None = None,
    rope_scaling: ScalingChoice | None = None,
    original_length: int | None = None,
) -> LoadedModel:
    """Load a model, and verify on its weights that longrope can extend it.

    Args:
        source: a local directory, a hub id, a GGUF file (it is dequantised), or
            ``"bundled"`` for the small model in the package.
        execution: device, dtype, chunk size and offloading. Offloaded weights in the
            checkpoint's dtype stay in the memory-mapped files.
        group: the sequence-parallel group.
        info: what :func:`inspect_model` returned for this source; without it the model is
            inspected here, with ``rope_scaling`` and ``original_length``.
        rope_scaling: as in :func:`inspect_model`.
        original_length: as in :func:`inspect_model`.

    Raises:
        ValueError: no such model, or one that cannot be extended, with the reason. What the
            config shows is refused before any weight is read.
    """
    execution = execution or ExecutionConfig()
    if group is None and execution.sequence_parallel > 1:
        raise ValueError(
            f"sequence_parallel is {execution.sequence_parallel}, and the model is loaded without "
            "the group of processes that share its sequences: give group"
        )
    trusted = execution.trust_remote_code
    dtype = "auto" if execution.dtype == "auto" else getattr(torch, execution.dtype)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    if info is None:
        info = inspect_model(
            source,
            rope_scaling=rope_scaling,
            original_length=original_length,
            trust_remote_code=trusted,
        )
    info.require_extendable()
    if group and group.size > 1 and info.attention_layers < info.layers:
        raise ValueError(
            f"sequence_parallel is {group.size}: recurrent layers of {info.architecture} need all "
            "previous tokens, so processes cannot share a sequence; leave it out"
        )
    where = find_device(local_device(execution.device))
    tokenizer = load_tokenizer(source, trusted)
    with announced(f"loading {display_name(source)}"), quiet():
        config = read_pretrained(AutoConfig, source, trusted)
        if info.replaces_scaling:
            options["config"] = unscaled(config, info.rotary_layer_type)
        model = read_pretrained(auto_class(config), source, trusted, **options)
    for part in (model.config, model.config.get_text_config()):
        if getattr(part, "tie_word_embeddings", False):  # the weights decide
            part.tie_word_embeddings = is_tied(model)
    model.eval()
    if execution.offload_weights:
        offload_layers(model, where)
    else:
        model.to(where)
    assert info.original_max_position_embeddings
    unextended = info.rescale("none", info.original_max_position_embeddings)
    dataclasses.replace(info, reason=incompatibility(model, unextended)).require_extendable()
    return LoadedModel(model, tokenizer, info, execution, group or SequenceParallelGroup())


def wrap_model(
    model: Any,
    tokenizer: Any = None,
    execution: ExecutionConfig | None = None,
    *,
    rope_scaling: ScalingChoice | None = None,
    original_length: int | None = None,
    loaded_unscaled: bool = False,
) -> LoadedModel:
    """Verify that a model in memory can be extended, and return it as a :class:`LoadedModel`.

    The model itself is not changed. It should be in evaluation mode.

    Args:
        model: a transformers model, or PEFT's wrapper of one; on one device.
        execution: chunk size, offloaded activations and sequence parallelism. Device, dtype and
            offloaded weights are the model's own.
        loaded_unscaled: the model was loaded without the scaling that its config has.

    Raises:
        ValueError: the model cannot be extended, is quantised, is spread over devices, or an
            execution option that a model in memory cannot follow.
    """
    base, execution = without_adapters(model), execution or ExecutionConfig()
    for name in ("device", "dtype", "offload_weights"):
        if getattr(execution, name) != ExecutionConfig.model_fields[name].default:
            raise ValueError(
                f"{name} is {getattr(execution, name)!r}, but the model is in memory already: load "
                "it so, or give its path"
            )
    if loaded_unscaled:
        rope_scaling = "replace"
    elif rope_scaling == "replace":
        raise ValueError(
            "rope_scaling is 'replace', which needs the model without its scaling: give its "
            "path instead of the model in memory"
        )
    refuse_quantised(base)
    places = {parameter.device for parameter in base.parameters()}
    if len(places) > 1 or torch.device("meta") in places:
        raise ValueError(
            f"model is spread over {', '.join(sorted(map(str, places)))}: load it on one device, "
            "or give its path with offload_weights"
        )
    info = inspect_model(base, rope_scaling=rope_scaling, original_length=original_length)
    info.require_extendable()
    assert info.original_max_position_embeddings
    unextended = info.rescale("none", info.original_max_position_embeddings)
    dataclasses.replace(info, reason=incompatibility(base, unextended)).require_extendable()
    return LoadedModel(base, tokenizer, info, execution)


def refuse_quantised(model: Any) -> None:
    """Refuse a loaded model with quantised weights.

    Raises:
        ValueError: it is quantised; names the library that did it.
    """
    if method := getattr(model, "quantization_method", None):
        raise ValueError(
            f"model is quantised ({getattr(method, 'value', method)}), which longrope has not been "
            "verified with: load it without quantisation"
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
