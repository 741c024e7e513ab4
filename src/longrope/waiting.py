"""Where hidden states wait while a layer is at work: on a device, or in files of a folder.

A slope of a long sequence keeps more than most machines have memory: of LLaMA2-7B's shape at two
million tokens 1.2 TB, all of it written once and read once or twice, a layer at a time. That is
what disks are for, and the system's own cache keeps as much of it in memory as there is room.
"""

import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from longrope.parallel import local_processes


def names_folder(name: str) -> bool:
    """Whether a ``hidden_device`` is a folder's name: it is no device's."""
    try:
        torch.device(name)
    except RuntimeError:
        return True
    return False


def room(where: torch.device | Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor without content; in a folder a file without a name, which ends with it.

    Raises:
        ValueError: the folder's disk is full, or the folder cannot be written.
    """
    if isinstance(where, torch.device):
        return torch.empty(shape, dtype=dtype, device=where)
    size = math.prod(shape) * dtype.itemsize
    try:
        with tempfile.TemporaryFile(dir=where) as file:
            # What is not there now would end the process when it is written.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            mapped = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise ValueError(
            f"hidden_device {where} has no room for {size / 1e9:,.1f} GB ({error.strerror}); give "
            "a folder of a larger disk"
        ) from None
    return torch.frombuffer(mapped, dtype=dtype).view(shape)


def free_on_disk(hidden_device: str | None) -> int | None:
    """Bytes free for each of this machine's processes, if it is a folder that is here."""
    if hidden_device is None or not names_folder(hidden_device):
        return None
    folder = Path(hidden_device).expanduser()
    return shutil.disk_usage(folder).free // local_processes() if folder.is_dir() else None
