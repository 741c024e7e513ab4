"""Find a model's rotary embedding, and read its frequencies and scaling."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longrope.rope.parameters import BY_POSITION, LENGTH, kept_parameters
from longrope.rope.rescale import UNROTATED, Rescale, default_inv_freq

# The layer type whose rotary embedding is scaled where a model has several. Sliding-window layers
# never see positions further apart than in training.
_SCALED_LAYER_TYPE = "full_attention"
UNSCALED = ("default", "proportional")
# Types whose frequencies do not depend on the sequence length.
_MOST_FREQUENCIES = 8192
_STATIC = ("default", "proportional", "linear", "yarn", "llama3")


@dataclass(frozen=True)
class RotarySite:
    """Location of the rotary embedding that a rescale replaces in a model."""

    owner: nn.Module  # the decoder: it calls the rotary module and owns the layers
    name: str
    module: Any
    layer_type: str | None  # the attention kind in models with one embedding per kind

    @property
    def inv_freq(self) -> Tensor:
        """The rotary module's frequencies in radians per token, shape (d/2,), float32."""
        prefix = "" if self.layer_type is None else f"{self.layer_type}_"
        if self.rope_type == "longrope":  # the module holds the short set until a long input
            config = self.module.config
            return _longrope_frequencies(config, self.layer_type)
        return getattr(self.module, f"{prefix}original_inv_freq")

    @property
    def attention_factor(self) -> float:
        """The rotary module's own factor of cosines and sines."""
        prefix = "" if self.layer_type is None else f"{self.layer_type}_"
        return float(getattr(self.module, f"{prefix}attention_scaling"))

    @property
    def rope_type(self) -> str:
        """The rotary module's ``rope_type``, which names the model's own scaling."""
        kind = self.module.rope_type
        return kind if self.layer_type is None else kind[self.layer_type]

    @property
    def parameters(self) -> dict[str, Any]:
        """The config's ``rope_parameters`` for this rotary embedding."""
        parameters = self.module.config.rope_parameters
        return dict(parameters if self.layer_type is None else parameters[self.layer_type])


def _longrope_frequencies(config: Any, layer_type: str | None) -> Tensor:
    """Compute the long factors' rotary frequencies from a ``longrope`` config."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = (
        config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    )
    beyond = parameters["original_max_position_embeddings"] + 1
    return ROPE_INIT_FUNCTIONS["longrope"](config, None, seq_len=beyond, layer_type=layer_type)[0]


def find_rotary(model: nn.Module) -> RotarySite | None:
    """Find a model's rotary embedding; None if there is none of a supported structure.

    Matches by structure (a child module with an ``inv_freq`` buffer and a config), not by
    architecture. In multimodal models it is the text part's.
    """
    config: Any = getattr(model, "config", None)
    text = type(config.get_text_config()) if hasattr(config, "get_text_config") else object
    own = (site for site in _rotary_sites(model) if isinstance(site.module.config, text))
    return next(own, None) or next(_rotary_sites(model), None)


def inside_wrappers(model: nn.Module) -> nn.Module:
    """Return the transformers model inside wrappers: those of torch.compile, DDP or PEFT.

    Wrappers hide the names of arguments.
    """
    from transformers import PreTrainedModel

    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)


def _rotary_sites(model: nn.Module) -> Iterator[RotarySite]:
    """Yield every rotary embedding of a model."""
    for owner in model.modules():
        for name, module in owner.named_children():
            if not hasattr(module, "config") or not hasattr(module, "rope_type"):
                continue
            # under a rescale, the model's own module
            module = getattr(module, "original", module)
            if hasattr(module, "inv_freq"):
                yield RotarySite(owner, name, module, None)
            elif hasattr(module, f"{_SCALED_LAYER_TYPE}_inv_freq"):
                yield RotarySite(owner, name, module, _SCALED_LAYER_TYPE)


def column_layout(site: RotarySite) -> Tensor:
    """Map each column of a rotary module's cosines to the index of its frequency.

    Calls the module at position 1, so any layout (repeated halves, interleaved, not repeated) is
    supported without a list of architectures.

    Raises:
        ValueError: the module does not compute cosines and sines of position · frequency.
    """
    kind = type(site.module).__name__
    try:
        module, output = _at_one(site)
        cos, sin = cosines_and_sines(output)
    except Exception as error:
        raise ValueError(
            f"{kind} cannot be rescaled: it does not return cosines and sines ({error})"
        ) from None
    here = RotarySite(site.owner, site.name, module, site.layer_type)
    prefix = "" if site.layer_type is None else f"{site.layer_type}_"
    frequencies = getattr(module, f"{prefix}inv_freq").double()
    if len(frequencies) > _MOST_FREQUENCIES:
        raise ValueError(f"{kind} has {len(frequencies):,} frequencies; correct its head_dim")
    angles = torch.atan2(sin.flatten().double(), cos.flatten().double())
    layout = (angles[:, None] - frequencies[None, :]).abs().argmin(dim=1)
    expected = (
        torch.stack([frequencies.cos(), frequencies.sin()])[:, layout] * here.attention_factor
    )
    actual = torch.stack([cos.flatten(), sin.flatten()]).double()
    if not torch.allclose(actual, expected, atol=1e-5):
        raise ValueError(
            f"{kind} cannot be rescaled: it does not compute cosines and sines of position times "
            "frequency"
        )
    return layout


def _at_one(site: RotarySite) -> tuple[Any, Any]:
    """Build a rotary module of the same class with real frequencies, and call it at position 1."""
    module = type(site.module)(config=site.module.config)
    extra = () if site.layer_type is None else (site.layer_type,)
    position = torch.ones(1, 1, dtype=torch.long)
    return module, module(torch.zeros(1, 1, 1, dtype=torch.float32), position, *extra)


def is_complex(site: RotarySite) -> bool:
    """Whether the rotary module returns complex numbers instead of cosines and sines."""
    return isinstance(_at_one(site)[1], Tensor)


def cosines_and_sines(output: Any) -> tuple[Tensor, Tensor]:
    """Split a rotary module's output, a pair or complex numbers, into cosines and sines."""
    if isinstance(output, Tensor):
        return output.real, output.imag
    cos, sin = output
    return cos, sin


def unscaled_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return a rotary embedding's ``rope_parameters`` without its scaling."""
    if parameters["rope_type"] in UNSCALED:
        return dict(parameters)
    kept = kept_parameters(parameters)
    factors = np.array(parameters.get("long_factor") or (1.0,))
    if (rotated := float((factors < UNROTATED / 10).mean())) < 1:  # as longrope exports it
        return kept | {"rope_type": "proportional", "partial_rotary_factor": rotated}
    return kept | {"rope_type": "default"}


def boundary_of(site: RotarySite) -> int | None:
    """Return the unit in which rotary parameters count positions to scale scores, or None.

    It is a length in tokens.
    """
    parameters = site.parameters
    return parameters[LENGTH] if BY_POSITION in parameters else None


def scaled_length(parameters: dict[str, Any], longest: int) -> int:
    """Return the length in tokens that a rotary embedding's existing scaling supports.

    Some configs raise ``max_position_embeddings`` to this length; others keep the length before
    scaling. The field is returned unchanged where the config does not tell which (``linear``), and
    where it was raised by another ratio than ``factor`` (``llama3``: 32 on 8,192 for 131,072).

    Args:
        parameters: the ``rope_parameters``.
        longest: ``max_position_embeddings``.
    """
    before = parameters.get("original_max_position_embeddings")
    # transformers' dynamic formula starts from max_position_embeddings.
    if parameters["rope_type"] == "dynamic":
        before = longest
    if before is None or (parameters["rope_type"] == "llama3" and longest > before):
        return longest
    return max(longest, round(before * (parameters.get("factor") or 1)))


def changes_nothing(site: RotarySite, rescale: Rescale) -> bool:
    """Return whether a rotary module already computes what a rescale would."""
    return (
        site.rope_type in _STATIC
        and rescale.attention_factor == site.attention_factor
        # transformers computes frequencies in float32, so compare up to rounding
        and np.allclose(
            rescale.inv_freq,
            site.inv_freq.double().cpu().numpy(),
            rtol=1e-6,
            atol=2 / UNROTATED,
        )
    )


def unscaled_factors(site: RotarySite) -> np.ndarray:
    """Return the factors of a rotary module without scaling, (d/2,): 1 where it rotates."""
    if site.rope_type == "proportional":
        return existing_factors(site)
    return np.ones(len(site.inv_freq))


def existing_factors(site: RotarySite) -> np.ndarray:
    """Return the factors that a rotary module already applies, (d/2,): 1 where unscaled."""
    theta = float(site.parameters["rope_theta"])
    inv_freq = site.inv_freq.double().cpu().numpy()
    default = default_inv_freq(theta, 2 * len(inv_freq))
    factors = np.divide(default, inv_freq, out=np.full_like(default, UNROTATED), where=inv_freq > 0)
    return np.where(np.abs(factors - 1) < 1e-6, 1.0, factors)
