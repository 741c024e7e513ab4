"""Find devices and directories to compute on and to offload to."""

import os
from pathlib import Path

import torch

from longrope.layerwise.storage import is_directory, warn_if_in_memory


def find_device(option: str, name: str | None) -> torch.device:
    """Return a device by name; without a name a GPU if there is one.

    Raises:
        ValueError: no such device on this machine; the message begins with ``option``.
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


def find_offload_target(option: str, name: str) -> torch.device | Path:
    """Return the device or writable directory that hidden states are offloaded to.

    Raises:
        ValueError: it is neither; the message begins with ``option``.
    """
    if not is_directory(name):
        return find_device(option, name)
    folder = Path(name).expanduser()
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{option} {name}: no device, and no folder that can be written")
    warn_if_in_memory(folder)
    return folder
