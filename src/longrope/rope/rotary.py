"""Where a model keeps its rotary embedding, and what that does as it came."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longrope.rope.rescale import UNTURNED, Rescale, default_inv_freq

# The layer type whose rotary embedding is scaled where a model has several:
# a sliding window never sees positions further apart than it was trained on.
_SCALED_LAYER_TYPE = "full_attention"
UNSCALED = ("default", "proportional")
# Kinds whose frequencies do not depend on the sequence: what they are is what they do.
_STATIC = ("default", "proportional", "linear", "yarn", "llama3")
_LENGTH = "original_max_position_embeddings"
# A scale of the scores that grows with the position (Ministral 3), in units of that length.
_BY_POSITION = "llama_4_scaling_beta"
_SCALING = {
    *("rope_type", "type", "factor", "attention_factor", _LENGTH, "truncate", "finetuned"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor"),
    *("short_factor", "long_factor", "short_mscale", "long_mscale"),
}


@dataclass(frozen=True)
class RotarySite:
    """Where a model keeps the rotary embedding that a rescale replaces."""

    owner: nn.Module  # the decoder: it calls the rotary module and owns the layers
    name: str
    module: Any
    layer_type: str | None  # the attention kind in models with one embedding per kind

    @property
    def inv_freq(self) -> Tensor:
        """Frequencies as the model has them now, shape (d/2,), float32."""
        prefix = "" if self.layer_type is None else f"{self.layer_type}_"
        if self.rope_type == "longrope":  # the module keeps the short set until a long input comes
            config = self.module.config
            return _longrope_frequencies(config, self.layer_type)
        return getattr(self.module, f"{prefix}original_inv_freq")

    @property
    def attention_factor(self) -> float:
        """What the model multiplies cosines and sines by now."""
        prefix = "" if self.layer_type is None else f"{self.layer_type}_"
        return float(getattr(self.module, f"{prefix}attention_scaling"))

    @property
    def rope_type(self) -> str:
        kind = self.module.rope_type
        return kind if self.layer_type is None else kind[self.layer_type]

    @property
    def parameters(self) -> dict[str, Any]:
        """The ``rope_parameters`` of the config that apply here."""
        parameters = self.module.config.rope_parameters
        return dict(parameters if self.layer_type is None else parameters[self.layer_type])


def _longrope_frequencies(config: Any, layer_type: str | None) -> Tensor:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = (
        config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    )
    beyond = parameters["original_max_position_embeddings"] + 1
    return ROPE_INIT_FUNCTIONS["longrope"](config, None, seq_len=beyond, layer_type=layer_type)[0]


def find_rotary(model: nn.Module) -> RotarySite | None:
    """The one rotary site of a model, or None if it has none that longrope knows.

    Works by structure (a child module with an ``inv_freq`` buffer and a config),
    not by architecture; of a model for pictures too it is the text's.
    """
    config: Any = getattr(model, "config", None)
    text = type(config.get_text_config()) if hasattr(config, "get_text_config") else object
    own = (site for site in _rotary_sites(model) if isinstance(site.module.config, text))
    return next(own, None) or next(_rotary_sites(model), None)


def _rotary_sites(model: nn.Module) -> Iterator[RotarySite]:
    for owner in model.modules():
        for name, module in owner.named_children():
            if not hasattr(module, "config") or not hasattr(module, "rope_type"):
                continue
            # the model's own is what counts
            module = getattr(module, "original", module)
            if hasattr(module, "inv_freq"):
                yield RotarySite(owner, name, module, None)
            elif hasattr(module, f"{_SCALED_LAYER_TYPE}_inv_freq"):
                yield RotarySite(owner, name, module, _SCALED_LAYER_TYPE)


def column_layout(site: RotarySite) -> Tensor:
    """For each column of the module's cosines, the index of the frequency behind it.

    Found by calling the module at position 1, so that any layout (halves repeated,
    interleaved, not repeated) is handled without a list of architectures.

    Raises:
        ValueError: the module computes something else than cosines and sines of
            position · frequency.
    """
    kind = type(site.module).__name__
    try:
        module, output = _at_one(site)
        cos, sin = cosines_and_sines(output)
    except Exception as error:
        raise ValueError(
            f"{kind} cannot be rescaled: it does not give cosines and sines ({error})"
        ) from None
    here = RotarySite(site.owner, site.name, module, site.layer_type)
    prefix = "" if site.layer_type is None else f"{site.layer_type}_"
    frequencies = getattr(module, f"{prefix}inv_freq").double()
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
    """A module of its kind with real frequencies, and what that gives for position 1."""
    module = type(site.module)(config=site.module.config)
    extra = () if site.layer_type is None else (site.layer_type,)
    return module, module(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.long), *extra)


def is_complex(site: RotarySite) -> bool:
    """Whether the module gives complex numbers in place of cosines and sines."""
    return isinstance(_at_one(site)[1], Tensor)


def cosines_and_sines(output: Any) -> tuple[Tensor, Tensor]:
    """Both, out of a pair or of complex numbers."""
    if isinstance(output, Tensor):
        return output.real, output.imag
    cos, sin = output
    return cos, sin


def kept_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """What a model's ``rope_parameters`` say beside its scaling, ``rope_theta`` among it.

    Beside ``longrope``, that is: there each dimension that does not turn has its factor.
    """
    kept = {key: value for key, value in parameters.items() if key not in _SCALING}
    if parameters["rope_type"] == "proportional":
        kept.pop("partial_rotary_factor", None)
    if _BY_POSITION in parameters:  # which counts in it
        kept[_LENGTH] = parameters[_LENGTH]
    return kept


def unscaled_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """A model's ``rope_parameters`` without its scaling."""
    if parameters["rope_type"] in UNSCALED:
        return dict(parameters)
    kept = kept_parameters(parameters)
    factors = np.array(parameters.get("long_factor") or (1.0,))
    if (turned := float((factors < UNTURNED / 10).mean())) < 1:  # as it was exported
        return kept | {"rope_type": "proportional", "partial_rotary_factor": turned}
    return kept | {"rope_type": "default"}


def boundary_of(site: RotarySite) -> int | None:
    """The length that the model's own scores count positions in, if they do."""
    parameters = site.parameters
    return parameters[_LENGTH] if _BY_POSITION in parameters else None


def scaled_length(parameters: dict[str, Any], longest: int) -> int:
    """Tokens that a model's own scaling is for.

    Some configs raise ``max_position_embeddings``, here ``longest``, to it, others leave it at the
    length before. Where nothing tells which (``linear``) it is taken as it stands, and where it was
    raised beside a factor that is no ratio of lengths (``llama3``: 32 of 8,192 for 131,072).
    """
    before = parameters.get("original_max_position_embeddings")
    if parameters["rope_type"] == "dynamic":  # transformers' formula has the length before there
        before = longest
    if before is None or (parameters["rope_type"] == "llama3" and longest > before):
        return longest
    return max(longest, round(before * (parameters.get("factor") or 1)))


def changes_nothing(site: RotarySite, rescale: Rescale) -> bool:
    """Whether a rescale is what the model does already."""
    return (
        site.rope_type in _STATIC
        and rescale.attention_factor == site.attention_factor
        # transformers computes its frequencies in float32: equal to rounding is equal
        and np.allclose(
            rescale.inv_freq,
            site.inv_freq.double().cpu().numpy(),
            rtol=1e-6,
            atol=2 / UNTURNED,
        )
    )


def unscaled_factors(site: RotarySite) -> np.ndarray:
    """The factors of a model without scaling, shape (d/2,): 1 but where it does not turn."""
    if site.rope_type == "proportional":
        return existing_factors(site)
    return np.ones(len(site.inv_freq))


def existing_factors(site: RotarySite) -> np.ndarray:
    """The factors that a model already applies, shape (d/2,): 1 where it is unscaled."""
    theta = float(site.parameters["rope_theta"])
    inv_freq = site.inv_freq.double().cpu().numpy()
    default = default_inv_freq(theta, 2 * len(inv_freq))
    factors = np.divide(default, inv_freq, out=np.full_like(default, UNTURNED), where=inv_freq > 0)
    return np.where(np.abs(factors - 1) < 1e-6, 1.0, factors)
