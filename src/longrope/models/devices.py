"""Find devices and directories to compute on and to offload to."""

import os
from pathlib import Path

import torch

from longrope.layerwise.activation_storage import is_directory, warn_if_in_memory


def find_device(name: str | None) -> torch.device:
    """Find a device by name; without a name, a GPU if there is one.

    Raises:
        ValueError: no such device on this machine.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return _device("device", name)


def find_offload_target(name: str) -> torch.device | Path:
    """Find the device or writable directory to offload hidden states to.

    Raises:
        ValueError: it is neither.
    """
    if not is_directory(name):
        return _device("offload_activations", name)
    folder = Path(name).expanduser()
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(
            f"offload_activations is {name!r}, which is neither a device nor a directory that "
            "can be written"
        )
    warn_if_in_memory(folder)
    return folder


def _device(parameter: str, name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"{parameter} is {name!r}, which this machine does not have ({first})"
        ) from None
    return device
