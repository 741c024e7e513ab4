"""Storage for offloaded activations: a device, or unnamed files in a directory.

The gradient of a long sequence keeps more than most machines have memory: 1.2 TB for
LLaMA2-7B's shape at two million tokens. All of it is written once and read a few times, a layer
at a time, which suits disks. The operating system caches the files in free memory.
"""

import contextlib
import errno
import functools
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from longrope.distributed import local_processes

log = logging.getLogger(__name__)

_DESCRIPTORS = "/proc/self/fd"


def is_directory(name: str) -> bool:
    """Whether activations are offloaded to a directory rather than a device of this name."""
    try:
        torch.device(name)
    except RuntimeError:
        return True
    return False


def allocate(where: torch.device | Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Allocate an uninitialised tensor on a device, or in an unnamed file of a directory.

    The file is deleted when the tensor is freed, or the process ends.

    Args:
        where: a device or a directory.
        shape: of the tensor.
        dtype: of the tensor.

    Raises:
        ValueError: the directory's disk is full, or the file cannot be created there.
    """
    if isinstance(where, torch.device):
        return torch.empty(shape, dtype=dtype, device=where)
    count = math.prod(shape)
    size = count * dtype.itemsize
    try:
        descriptor, name = _new_file(where)
        try:
            try:
                os.truncate(descriptor, size)
                tensor = torch.from_file(name, shared=True, size=count, dtype=dtype)
            finally:
                if not name.startswith(_DESCRIPTORS):
                    os.unlink(name)
            # Without reserved space, writing to a full disk would kill the process (SIGBUS).
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)
        finally:
            os.close(descriptor)
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise ValueError(
            f"offload_activations {where}: cannot create a file of {size / 1e9:,.1f} GB ({why}): "
            f"use a directory on a {'larger disk' if full else 'disk with memory-mapped files'}"
        ) from None
    return tensor.view(shape)


def _new_file(directory: Path) -> tuple[int, str]:
    """Create an offload file to map; return its descriptor and a path to open it by.

    On Linux the file never has a name, so a kill at any point leaves nothing behind. Where that
    is not supported the path is a name, which the caller deletes once the file is mapped.
    """
    if hasattr(os, "O_TMPFILE") and os.path.isdir(_DESCRIPTORS):
        with contextlib.suppress(OSError):
            descriptor = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
            return descriptor, f"{_DESCRIPTORS}/{descriptor}"
    return tempfile.mkstemp(prefix="longrope-", dir=directory)


@functools.cache
def warn_if_in_memory(folder: Path) -> None:
    """Warn once if the offload directory for hidden states is itself in memory."""
    if in_memory(folder):
        log.warning("offload_activations %s: its files are kept in memory, not on a disk", folder)


def in_memory(folder: Path) -> bool:
    """Whether an offload directory's files are kept in memory (tmpfs), as in /dev/shm."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    kinds = [line.partition(" - ")[2].split()[0] for line in mounts if line.split()[2] == number]
    return any(kind in ("tmpfs", "ramfs") for kind in kinds)


def free_on_disk(offload_activations: str | None) -> int | None:
    """Return the free bytes per local process in an offload directory; None for devices."""
    if offload_activations is None or not is_directory(offload_activations):
        return None
    folder = Path(offload_activations).expanduser()
    return shutil.disk_usage(folder).free // local_processes() if folder.is_dir() else None
