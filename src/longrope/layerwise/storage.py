"""Where hidden states wait while a layer is at work: on a device, or in files of a folder.

A slope of a long sequence keeps more than most machines have memory: of LLaMA2-7B's shape at two
million tokens 1.2 TB, all of it written once and read a few times, a layer at a time. That is
what disks are for, and the system's own cache keeps as much of it in memory as there is room.
"""

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

from longrope.distributed import RankLost, local_processes

log = logging.getLogger(__name__)


def is_directory(name: str) -> bool:
    """Whether a ``offload_activations`` is a folder's name: it is no device's."""
    try:
        torch.device(name)
    except RuntimeError:
        return True
    return False


def allocate(where: torch.device | Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor without content; in a folder a file without a name, which ends with it.

    Raises:
        ValueError: the folder's disk is full, or no such file can be made there.
    """
    if isinstance(where, torch.device):
        return torch.empty(shape, dtype=dtype, device=where)
    count = math.prod(shape)
    size = count * dtype.itemsize
    try:
        descriptor, name = tempfile.mkstemp(prefix="longrope-", dir=where)
        try:
            try:
                os.truncate(descriptor, size)
                tensor = torch.from_file(name, shared=True, size=count, dtype=dtype)
            finally:
                os.unlink(name)
            # What is not reserved now would end the process when it is written.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)
        finally:
            os.close(descriptor)
    except RankLost:  # a launcher's word, whatever is under way
        raise
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise ValueError(
            f"offload_activations {where}: no file of {size / 1e9:,.1f} GB ({why}); give a folder "
            "of "
            f"a {'larger disk' if full else 'disk that files can be made and mapped on'}"
        ) from None
    return tensor.view(shape)


@functools.cache
def say_if_in_memory(folder: Path) -> None:
    """Once, that what waits in a folder is not on a disk."""
    if in_memory(folder):
        log.warning("offload_activations %s: files there are in memory, not on a disk", folder)


def in_memory(folder: Path) -> bool:
    """Whether a folder's files are memory (tmpfs), as those of /dev/shm are, and some /tmp's."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    kinds = [line.partition(" - ")[2].split()[0] for line in mounts if line.split()[2] == number]
    return any(kind in ("tmpfs", "ramfs") for kind in kinds)


def free_on_disk(offload_activations: str | None) -> int | None:
    """Bytes free for each of this machine's processes, if it is a folder that is here."""
    if offload_activations is None or not is_directory(offload_activations):
        return None
    folder = Path(offload_activations).expanduser()
    return shutil.disk_usage(folder).free // local_processes() if folder.is_dir() else None
