"""Apply a :class:`Rescale` to a live model, and restore the model exactly.

A transformers model's rotary module turns positions into the cosines and sines that attention
multiplies in. Applying a rescale replaces that module by one with rescaled frequencies. The
replacement also does two things that no config can express: positions below ``start_tokens``
keep the original angles, and phases are exact at any position.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longrope.rope.rescale import Rescale
from longrope.rope.rotary import (
    RotarySite,
    changes_nothing,
    column_layout,
    cosines_and_sines,
    find_rotary,
    inside_wrappers,
    is_complex,
)
from longrope.stand_in import StandIn

# Positions, and the cosines and sines (or complex numbers) computed for them.
Rotation = tuple[Tensor, tuple[Tensor, ...]]


class RescaledRotary(StandIn):
    """Stand-in for a model's rotary module: cosines and sines of a rescaled RoPE.

    Phases are computed in float64 and reduced before the cosine; in float32 they would be off by up
    to 0.06 rad at position 2²¹. Frequencies stay float32, as in inference engines. Nothing here is
    a buffer, so casting the model to bfloat16 does not affect it.
    """

    def __init__(self, site: RotarySite, rescale: Rescale):
        super().__init__(site.module)
        self.config = site.module.config
        self.rope_type = "longrope"
        self.layer_type = site.layer_type
        self.rescale = rescale
        # Dimensions that the model does not rotate stay unrotated under any factor.
        rotates = site.inv_freq.detach().cpu() > 0
        self.inv_freq = torch.where(rotates, torch.from_numpy(rescale.inv_freq).float(), 0.0)
        self.attention_scaling = rescale.attention_factor
        self._recorded: list[Rotation] | None = None
        self._positions: Tensor | None = None
        self._original_inv_freq = site.inv_freq.detach().float().cpu()
        self._original_attention_scaling = site.attention_factor
        self._layout = column_layout(site)
        self._complex = is_complex(site)
        self.hooks: tuple[Any, ...] = ()
        self.before: tuple[nn.Module, ...] = ()  # in a tuple, as the original is

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Rotation]]:
        """Record cosines and sines computed in a ``with`` block, as leaves for :meth:`gradient`."""
        self._recorded = recorded = []
        try:
            yield recorded
        finally:
            self._recorded = None

    @contextlib.contextmanager
    def positions_as(self, position_ids: Tensor) -> Iterator[None]:
        """Rotate token i as if it stood at ``position_ids[:, i]`` within a ``with`` block."""
        self._positions = position_ids
        try:
            yield
        finally:
            self._positions = None

    @torch.no_grad()
    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, ...] | Tensor:
        """Compute the cosines and sines of a rescaled RoPE, shape (batch, tokens, columns).

        Returns complex numbers instead where the model's own module does.

        Args:
            x: determines dtype and device.
            position_ids: shape (batch, tokens).
            layer_type: the kind of layer, in models with one embedding per kind.
        """
        if layer_type != self.layer_type:
            return self.original(x, position_ids, layer_type)
        position_ids = one_axis(position_ids)
        # Apple's GPUs have no float64, so their angles are computed on the CPU.
        where = torch.device("cpu") if x.device.type == "mps" else x.device
        if self._positions is not None:
            position_ids = torch.take_along_dim(self._positions, position_ids, 1)
        positions = position_ids.to(where)
        phases, scaling, _ = self._phases(positions)
        layout, dtype = self._layout.to(where), x.dtype
        cos, sin = ((f * scaling)[..., layout] for f in (phases.cos(), phases.sin()))
        if self._complex:
            given = (torch.complex(cos.float(), sin.float()).to(x.device),)
        else:
            given = tuple(part.to(dtype).to(x.device) for part in (cos, sin))
        if self._recorded is not None:
            self._recorded.append((positions, tuple(part.requires_grad_() for part in given)))
        return given[0] if self._complex else given

    def _phases(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rescaled phases, attention factors, and a mask of the first ``start_tokens``.

        Phases are float64, shape (batch, tokens, d/2).
        """
        column = positions[..., None]
        inv_freq = self.inv_freq.to(column.device).double()
        # As published, the first tokens keep angle *and* temperature (eq. 3 with I = 1).
        first = column < self.rescale.start_tokens
        scaling = torch.full_like(column, self.attention_scaling, dtype=torch.float64)
        if self.rescale.start_tokens:
            original = self._original_inv_freq.to(column.device).double()
            inv_freq = torch.where(first, original, inv_freq)
            scaling = torch.where(first, self._original_attention_scaling, scaling)
        return column.double() * inv_freq, scaling, first

    @torch.no_grad()
    def gradient(self, recorded: Sequence[Rotation]) -> Tensor:
        """Sum d loss / d ln λ over recorded rotations, after a backward pass to them.

        The result has shape (d/2,), float64.

        A phase is p = n · θ^(−2i/d) / λ, so d p / d ln λ = −p.

        Args:
            recorded: the rotations that :meth:`recording` collected.

        Raises:
            ValueError: the loss does not depend on any recorded rotation.
        """
        total = torch.zeros(len(self.inv_freq), dtype=torch.float64)
        found = False
        for positions, given in recorded:
            grads = tuple(part.grad for part in given if part.grad is not None)
            if len(grads) < len(given):
                continue
            found = True
            phases, scaling, first = self._phases(positions)
            layout = self._layout.to(positions.device)
            # The gradient of a complex number holds those of its real and imaginary parts.
            cos_grad, sin_grad = cosines_and_sines(grads[0] if self._complex else grads)
            cos_grad, sin_grad = (t.to(positions.device).double() for t in (cos_grad, sin_grad))
            phase = phases[..., layout]
            phase_grad = (phase.cos() * sin_grad - phase.sin() * cos_grad) * scaling
            factor_grad = torch.where(first, 0.0, -phase * phase_grad).flatten(0, -2).sum(dim=0)
            total += torch.zeros_like(total).index_add(0, self._layout, factor_grad.cpu())
        if not found:
            raise ValueError(
                "no gradient reaches this model's rotary cosines: use algorithm 'evolution'"
            )
        return total


@contextlib.contextmanager
def rescaled(model: nn.Module, rescale: Rescale | None, *, always: bool = False) -> Iterator[None]:
    """Apply ``rescale`` to a model within a ``with`` block, and restore it bit for bit after.

    Position ids that the caller does not pass are computed from the attention mask, so that a
    left-padded row equals the unpadded one.

    Args:
        model: a transformers model.
        rescale: None changes nothing.
        always: replace the rotary module even if the rescale equals the model's own scaling.

    Raises:
        ValueError: the model has no rotary embedding that can be rescaled, or the rescale has the
            wrong number of factors or another ``rope_theta``.
    """
    if rescale is None:
        yield
        return
    site = rotary_to_rescale(model, rescale)
    untouched = getattr(site.owner, site.name) is site.module
    if not always and untouched and changes_nothing(site, rescale):
        yield
        return
    _install(model, site, rescale)
    try:
        yield
    finally:
        _uninstall(site)


def apply_rescale(model: nn.Module, rescale: Rescale) -> None:
    """Apply a rescale to a model in place, until :func:`remove_rescale`.

    A rescale that was applied before is replaced. For a ``with`` block use :func:`rescaled`. The
    config is left as it is; ``longrope.export`` writes checkpoints with factors.

    Raises:
        ValueError: as :func:`rescaled`.

    Example:
        >>> import longrope
        >>> loaded = longrope.load_model("bundled")
        >>> yarn = longrope.methods.yarn(loaded.info, target_length="8x")
        >>> longrope.apply_rescale(loaded.model, yarn)
        >>> longrope.remove_rescale(loaded.model)
    """
    site = rotary_to_rescale(model, rescale)
    remove_rescale(model)
    _install(model, site, rescale)


def remove_rescale(model: nn.Module) -> None:
    """Remove what :func:`apply_rescale` put into a model; without it, do nothing.

    A model of ``longrope.from_pretrained`` has its own factors again.
    """
    site = find_rotary(model)
    if site is not None and isinstance(getattr(site.owner, site.name), RescaledRotary):
        _uninstall(site)


def rotary_to_rescale(model: nn.Module, *rescales: Rescale) -> RotarySite:
    """Find the rotary embedding of a model, and check that rescales fit it.

    Raises:
        ValueError: the model has no rotary embedding that can be rescaled, or a rescale does not
            fit.
    """
    site = find_rotary(model)
    if site is None:
        raise ValueError(f"{type(model).__name__} has no rotary position embedding to rescale")
    for rescale in rescales:
        check_fits(rescale, len(site.inv_freq), float(site.parameters["rope_theta"]))
    return site


def _install(model: nn.Module, site: RotarySite, rescale: Rescale) -> None:
    """Put a rescaled rotary module into a model, with hooks that compute position ids."""
    rotary = RescaledRotary(site, rescale)
    # In multimodal models the decoder does not get the mask, so the model is hooked too.
    rotary.hooks = tuple(
        module.register_forward_pre_hook(_positions_from_mask, with_kwargs=True)
        for module in dict.fromkeys((inside_wrappers(model), site.owner))
    )
    rotary.before = (getattr(site.owner, site.name),)  # an outer rescale, perhaps
    setattr(site.owner, site.name, rotary)


def _uninstall(site: RotarySite) -> None:
    """Put back the module that was there before a rescaled rotary module, and remove its hooks."""
    rotary = getattr(site.owner, site.name)
    for hook in rotary.hooks:
        hook.remove()
    setattr(site.owner, site.name, rotary.before[0])


@contextlib.contextmanager
def position_override(model: nn.Module, position_ids: Tensor | None) -> Iterator[None]:
    """Rotate a rescaled model's tokens as if they stood at ``position_ids``, (batch, tokens).

    For a ``with`` block. Attention and its masks still count tokens, so a jump does not start
    another sequence. Requires a model inside :func:`rescaled`; None changes nothing.
    """
    if position_ids is None:
        yield
        return
    site = find_rotary(model)
    rotary = site and getattr(site.owner, site.name)
    assert isinstance(rotary, RescaledRotary), "position_override requires a rescaled model"
    with rotary.positions_as(position_ids):
        yield


def check_fits(rescale: Rescale, factors: int, rope_theta: float) -> None:
    """Check that a rescale can be applied to a model: number of factors, and ``rope_theta``.

    Args:
        rescale: to check.
        factors: the number of factors that the model needs.
        rope_theta: of the model.

    Raises:
        ValueError: another number of factors, or another ``rope_theta``.
    """
    if len(rescale.factors) != factors:
        raise ValueError(
            f"factors has {len(rescale.factors)} numbers; this model needs {factors} (half its "
            f"rotary dimension of {2 * factors})"
        )
    if not np.allclose(rescale.rope_theta, rope_theta, rtol=1e-6):
        raise ValueError(f"rope_theta is {rescale.rope_theta:g}; this model's is {rope_theta:g}")


def _positions_from_mask(owner: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of a rescaled model: compute position ids from the attention mask."""
    given = inspect.signature(owner.forward).bind_partial(*args, **kwargs).arguments
    given = given | given.get("kwargs", {})
    mask = given.get("attention_mask")
    if given.get("position_ids") is not None or not isinstance(mask, Tensor) or mask.dim() != 2:
        return args, kwargs
    tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
    return args, kwargs | {"position_ids": positions_of(tokens, mask)}


def one_axis(position_ids: Tensor) -> Tensor:
    """Reduce multimodal position ids to one axis, (batch, tokens), as a rescale requires.

    Raises:
        ValueError: the axes differ, as for an image.
    """
    if position_ids.dim() == 2:
        return position_ids
    # For text all axes are views of one row, so the GPU need not be synchronised.
    if position_ids.stride(0) and not (position_ids == position_ids[:1]).all():
        raise ValueError(
            "position ids of different axes differ, as for images: a rescale supports text only"
        )
    return position_ids[0]


def positions_of(tokens: Tensor, mask: Tensor | None, cached: int = 0) -> Tensor:
    """Compute position ids (batch, tokens) for a rescaled model, counting unmasked tokens."""
    if mask is None:
        row = torch.arange(cached, cached + tokens.shape[1], device=tokens.device)
        return row[None].expand(tokens.shape[0], -1)
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
