"""Ranks and process groups; the only module that imports torch.distributed."""

import contextlib
import datetime
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longrope.errors import RankLost

_LOST = (
    "another process of this run died; saved results are kept, run the same command again to resume"
)


# A dead process closes its connections and is detected at once. The timeout only limits waiting for
# a slow one, which may compute its share for days.
_TIMEOUT = datetime.timedelta(days=7)


def sharded() -> bool:
    """Return whether the ranks of this run shard the trained model (FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def local_processes() -> int:
    """Number of ranks of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def require_one_process(verb: str) -> None:
    """Refuse to run a command under torchrun with several processes.

    Raises:
        ValueError: a launcher started several processes.
    """
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"{verb} supports one process, not {size}: start it without torchrun")


class SequenceParallelGroup:
    """Sequence-parallel group: the processes that share each sequence, by chunks.

    A group of one process shares nothing. Tensors are exchanged on their own device, with gloo on
    CPUs and NCCL on GPUs.
    """

    def __init__(self, rank: int = 0, size: int = 1, process_group: Any = None):
        self.rank = rank
        self.size = size
        self._process_group = process_group

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Gather a tensor from every process of the group, in rank order; all have one shape.

        Raises:
            RankLost: another process died.
        """
        raw = tensor.contiguous().view(torch.uint8)  # gloo does not support every dtype
        found = [torch.empty_like(raw) for _ in range(self.size)]
        with _collective():
            dist.all_gather(found, raw, group=self._process_group)
        return [one.view(tensor.dtype) for one in found]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the group in rank order, bit-identical on every process.

        Raises:
            RankLost: another process died.
        """
        return torch.stack(self.gather(tensor)).sum(dim=0) if self.size > 1 else tensor

    def exchange(self, tensor: Tensor) -> Tensor:
        """Exchange one tensor with every process of the group (all-to-all).

        Args:
            tensor: shape (size, …); row i is sent to process i.

        Returns:
            Shape (size, …); row i is what process i sent to this one.

        Raises:
            RankLost: another process died.
        """
        sent = tensor.view(torch.uint8)
        found = torch.empty_like(sent)
        with _collective():
            dist.all_to_all_single(found, sent, group=self._process_group)
        return found.view(tensor.dtype)


class Ranks:
    """This process among those that torchrun started; with one process every call is trivial.

    Numbers and JSON are exchanged over gloo on the CPU, whatever device the model is on. The
    processes of a sequence-parallel group do the same work together; by default each process is a
    group of its own.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: SequenceParallelGroup | None = None):
        self.rank = rank
        self.size = size
        self.group = group or SequenceParallelGroup()

    @property
    def group_count(self) -> int:
        """Number of sequence-parallel groups, which compute independently."""
        return self.size // self.group.size

    @property
    def group_index(self) -> int:
        """Index of this rank's sequence-parallel group."""
        return self.rank // self.group.size

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def gather(self, value: float) -> list[float]:
        """Gather the value of every rank, in rank order, on every rank.

        Raises:
            RankLost: another process died.
        """
        return [row[0] for row in self.gather_rows([value])]

    def gather_rows(self, row: Sequence[float]) -> list[list[float]]:
        """Gather a row of numbers from every rank; all rows must have one length.

        Raises:
            RankLost: another process died.
        """
        if self.size == 1:
            return [list(row)]
        mine = torch.tensor(row, dtype=torch.float64)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        with _collective():
            dist.all_gather(rows, mine)
        return [found.tolist() for found in rows]

    def broadcast(self, value: Any) -> Any:
        """Send rank 0's JSON value to every rank.

        Raises:
            RankLost: another process died.
        """
        if self.size == 1:
            return value
        content = json.dumps(value).encode() if self.first else b""
        size = torch.tensor([len(content)])
        with _collective():
            dist.broadcast(size, src=0)
            data = torch.zeros(int(size.item()), dtype=torch.uint8)
            if self.first:
                data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            dist.broadcast(data, src=0)
        return json.loads(bytes(data.tolist()))


@contextlib.contextmanager
def ranks(sequence_parallel: int = 1) -> Iterator[Ranks]:
    """Join the process group that torchrun started, or yield a single rank.

    Args:
        sequence_parallel: number of processes that share a sequence.

    Raises:
        ValueError: ``sequence_parallel`` does not divide the number of processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if sequence_parallel < 1 or size % sequence_parallel:
        raise ValueError(
            f"sequence_parallel is {sequence_parallel}; it must divide the number of processes, "
            f"{size}: start N processes with torchrun --nproc-per-node N"
        )
    if size == 1:
        yield Ranks()
        return
    # Losses and JSON travel over gloo; gradients, where there are GPUs, over nccl.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _stdout_to_stderr():
        dist.init_process_group(backend, timeout=_TIMEOUT)
        group = _join_group(sequence_parallel)
    # torchrun terminates the others when one process dies; report it as RankLost too.
    signal.signal(signal.SIGTERM, _terminated)
    try:
        yield Ranks(dist.get_rank(), size, group)
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect standard output while ranks connect, as gloo prints its peers in torch 2.8.

    ``--json`` prints to standard output.
    """
    try:
        kept = os.dup(1)
    except OSError:  # standard output is closed
        yield
        return
    if sys.stdout:
        sys.stdout.flush()
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _join_group(members: int) -> SequenceParallelGroup:
    """Create all groups of neighbouring ranks, which share a node, and return this rank's."""
    rank, own = dist.get_rank(), None
    if members == 1:
        return SequenceParallelGroup()
    for first in range(0, dist.get_world_size(), members):  # every process must create every group
        created = dist.new_group(list(range(first, first + members)), timeout=_TIMEOUT)
        if first <= rank < first + members:
            own = created
    return SequenceParallelGroup(rank % members, members, own)


def local_device(name: str | None) -> str | None:
    """Return this rank's device: a GPU of its own where several ranks share a machine.

    Raises:
        ValueError: several ranks would share one GPU.
    """
    local, here = os.environ.get("LOCAL_RANK"), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    indexed = name is not None and ":" in name and not name.startswith("cpu")
    if here > 1 and indexed and str(name).partition(":")[2] != local:
        raise ValueError(
            f"device is {name!r}, which {here} processes would share: leave the device unset to "
            "give each process its own"
        )
    if local is None or name not in (None, "cuda") or not torch.cuda.is_available():
        return name
    gpus = torch.cuda.device_count()
    # torchrun shows every process all GPUs. Other launchers may show each process one GPU only,
    # numbered 0 in all of them.
    if here > gpus and "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError(
            f"{here} processes for {gpus} GPU{'s' * (gpus > 1)} on this machine: start one process "
            "per GPU, or set the device to cpu"
        )
    return f"cuda:{int(local) % gpus}"


def is_lost_rank_error(error: Exception) -> bool:
    """Whether any library's error comes from gloo or NCCL because another rank died.

    gloo has no error type for it, only the name of the failing source file; NCCL has a sentence.
    """
    signs = ("gloo/transport", "remote process exited")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


@contextlib.contextmanager
def detect_lost_ranks() -> Iterator[None]:
    """Raise :class:`RankLost` where a library's own communication fails, as in training.

    Raises:
        RankLost: another process died.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_rank_error(error):
            raise
        raise RankLost(f"{_LOST} ({str(error).splitlines()[0]})") from None


@contextlib.contextmanager
def _collective() -> Iterator[None]:
    """Raise :class:`RankLost` where a collective of torch.distributed fails."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankLost(f"{_LOST} ({str(error).splitlines()[0]})") from None


def _terminated(*_: Any) -> None:
    """Signal handler: the launcher terminates this rank because another one died."""
    raise RankLost(f"{_LOST} (terminated by the launcher)")
