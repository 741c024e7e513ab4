"""Known methods (YaRN, NTK, PI, …) for an inspected model: the public ``longrope.methods``.

Each returns a :class:`~longrope.Rescale`. The formulas behind them are in ``rope/methods.py``.
"""

from transformers import PreTrainedModel

from longrope.models.info import ModelInfo, inspect_model
from longrope.rope.rescale import Rescale
from longrope.units import parse_length

Model = ModelInfo | PreTrainedModel | str


def none(info: Model, target_length: int | str) -> Rescale:
    """Return the model's own factors: no extension."""
    return _rescale("none", info, target_length)


def pi(info: Model, target_length: int | str) -> Rescale:
    """Return the factors of position interpolation (Chen et al. 2023).

    Args:
        info: a model in memory, its path or hub id, or what :func:`longrope.inspect_model`
            returned.
        target_length: tokens, or such as ``"128k"`` or ``"8x"``.

    Example:
        >>> import longrope
        >>> info = longrope.inspect_model("bundled")
        >>> longrope.methods.pi(info, target_length="4x").factors[:2]
        (4.0, 4.0)
    """
    return _rescale("pi", info, target_length)


def ntk(info: Model, target_length: int | str) -> Rescale:
    """Return the factors of NTK-aware scaling (bloc97 2023); arguments as of :func:`pi`."""
    return _rescale("ntk", info, target_length)


def dynamic_ntk(
    info: Model,
    target_length: int | str,
    *,
    sequence_length: int | None = None,
) -> Rescale:
    """Return the factors of dynamic NTK scaling, as in transformers; arguments as of :func:`pi`.

    Args:
        sequence_length: tokens of the sequence; by default the target.
    """
    return _rescale("dynamic-ntk", info, target_length, sequence_length)


def yarn(info: Model, target_length: int | str) -> Rescale:
    """Return the factors of YaRN (Peng et al. 2023); arguments as of :func:`pi`.

    Example:
        >>> import longrope
        >>> info = longrope.inspect_model("bundled")
        >>> longrope.methods.yarn(info, target_length=2048).max_position_embeddings
        2048
    """
    return _rescale("yarn", info, target_length)


def mrrope_uni(info: Model, target_length: int | str) -> Rescale:
    """Return the factors of MrRoPE-Uni (arXiv 2601.22181); arguments as of :func:`pi`."""
    return _rescale("mrrope-uni", info, target_length)


def mrrope_pro(info: Model, target_length: int | str) -> Rescale:
    """Return the factors of MrRoPE-Pro (arXiv 2601.22181); arguments as of :func:`pi`.

    Example:
        >>> import longrope
        >>> longrope.methods.mrrope_pro("bundled", target_length="4x").factors[-1]
        4.0
    """
    return _rescale("mrrope-pro", info, target_length)


def tailspline(info: Model, target_length: int | str) -> Rescale:
    """Return the factors of TailSpline (published as code only); arguments as of :func:`pi`."""
    return _rescale("tailspline", info, target_length)


def llama3(info: Model, target_length: int | str) -> Rescale:
    """Return the factors of Llama 3.1; arguments as of :func:`pi`."""
    return _rescale("llama3", info, target_length)


def _rescale(
    name: str,
    info: Model,
    target_length: int | str,
    length: int | None = None,
) -> Rescale:
    if not isinstance(info, ModelInfo):
        info = inspect_model(info)
    info.require_extendable()
    target = parse_length(target_length, info.original_max_position_embeddings)
    return info.rescale(name, target, length)
