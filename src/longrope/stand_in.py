"""Base class of the modules that temporarily replace one of a model's own modules."""

from typing import Any

from torch import nn


class StandIn(nn.Module):
    """Base class of stand-ins: replaces a module and forwards unknown attributes to it.

    Args:
        original: the module that is replaced.
    """

    def __init__(self, original: nn.Module):
        super().__init__()
        # In a tuple, so that the original is not registered as a submodule.
        self._original = (original,)

    @property
    def original(self) -> Any:
        """The module that the stand-in replaces."""
        return self._original[0]

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the replaced module, which some models read from the stand-in."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_original":  # not set yet
                raise
            return getattr(self._original[0], name)
