"""Several processes on one search: the only file that imports torch.distributed."""

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

_LOST = (
    "another process of this run died; what was saved stands, and the same command goes on "
    "from there"
)


# A process that dies is noticed at once; one that works for days on its share is waited for.
_PATIENCE = datetime.timedelta(days=7)


def sharded() -> bool:
    """Whether accelerate was told to shard the model that is trained over the processes (FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def local_processes() -> int:
    """How many processes of this run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def require_one_process(verb: str) -> None:
    """Refuse what several processes would do over each other.

    Raises:
        ValueError: a launcher started several.
    """
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"{verb} is work for one process, not {size}: start it without torchrun")


class RankLost(RuntimeError):
    """Another process of the run died."""


class Team:
    """The processes that share each sequence, some chunks of it each; one alone shares nothing.

    Exchanges tensors on whatever device they are: gloo on CPUs, nccl on GPUs.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None):
        self.rank = rank
        self.size = size
        self._group = group

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every process, in order; all of one shape.

        Raises:
            RankLost: a process is gone.
        """
        raw = tensor.contiguous().view(torch.uint8)  # gloo does not know every dtype
        found = [torch.empty_like(raw) for _ in range(self.size)]
        with _losses_named():
            dist.all_gather(found, raw, group=self._group)
        return [one.view(tensor.dtype) for one in found]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor, in their order: the same bits for all.

        Raises:
            RankLost: a process is gone.
        """
        return torch.stack(self.gather(tensor)).sum(dim=0) if self.size > 1 else tensor

    def exchange(self, tensor: Tensor) -> Tensor:
        """From what is for each process, shape (size, …), to what each of them had for this one.

        Raises:
            RankLost: a process is gone.
        """
        sent = tensor.view(torch.uint8)
        found = torch.empty_like(sent)
        with _losses_named():
            dist.all_to_all_single(found, sent, group=self._group)
        return found.view(tensor.dtype)


class Ranks:
    """This process among those that torchrun started; alone, every call is trivial.

    Exchanges numbers and JSON over gloo, on the CPU, whatever the model runs on. The processes of a
    team do the same work together; by default each is a team of its own.
    """

    def __init__(self, rank: int = 0, size: int = 1, team: Team | None = None):
        self.rank = rank
        self.size = size
        self.team = team or Team()

    @property
    def teams(self) -> int:
        """How many teams there are: so many things are computed at a time."""
        return self.size // self.team.size

    @property
    def own_team(self) -> int:
        """The number of this process's team."""
        return self.rank // self.team.size

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def gather(self, value: float) -> list[float]:
        """The value of every rank, in rank order, on every rank.

        Raises:
            RankLost: a process is gone.
        """
        return [row[0] for row in self.gather_rows([value])]

    def gather_rows(self, row: Sequence[float]) -> list[list[float]]:
        """The same for as many numbers of each rank, the same count on all.

        Raises:
            RankLost: a process is gone.
        """
        if self.size == 1:
            return [list(row)]
        mine = torch.tensor(row, dtype=torch.float64)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        with _losses_named():
            dist.all_gather(rows, mine)
        return [found.tolist() for found in rows]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON value, on every rank.

        Raises:
            RankLost: a process is gone.
        """
        if self.size == 1:
            return value
        content = json.dumps(value).encode() if self.first else b""
        size = torch.tensor([len(content)])
        with _losses_named():
            dist.broadcast(size, src=0)
            data = torch.zeros(int(size.item()), dtype=torch.uint8)
            if self.first:
                data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            dist.broadcast(data, src=0)
        return json.loads(bytes(data.tolist()))


@contextlib.contextmanager
def ranks(sequence_parallel: int = 1) -> Iterator[Ranks]:
    """The ranks that torchrun started, or the one process that there is.

    Args:
        sequence_parallel: how many of them make a team.

    Raises:
        ValueError: there are not so many, or not a multiple of it.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if sequence_parallel < 1 or size % sequence_parallel:
        raise ValueError(
            f"--sequence-parallel is {sequence_parallel}, of {size} processes; it must divide "
            "them: torchrun --nproc-per-node N starts N"
        )
    if size == 1:
        yield Ranks()
        return
    # Losses and JSON travel over gloo; gradients, where there are GPUs, over nccl.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _gloo_quiet():
        dist.init_process_group(backend, timeout=_PATIENCE)
        team = _own_team(sequence_parallel)
    # torchrun ends the others when one dies: say the same, whichever word comes first.
    signal.signal(signal.SIGTERM, _terminated)
    try:
        yield Ranks(dist.get_rank(), size, team)
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


@contextlib.contextmanager
def _gloo_quiet() -> Iterator[None]:
    """torch 2.8's gloo says on standard output whom it met, where ``--json`` has the result."""
    try:
        kept = os.dup(1)
    except OSError:  # it is closed
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


def _own_team(members: int) -> Team:
    """Neighbours are a team: torchrun numbers the processes of a node one after the other."""
    rank, own = dist.get_rank(), None
    if members == 1:
        return Team()
    for first in range(0, dist.get_world_size(), members):  # every process makes every group
        group = dist.new_group(list(range(first, first + members)), timeout=_PATIENCE)
        if first <= rank < first + members:
            own = group
    return Team(rank % members, members, own)


def local_device(name: str | None) -> str | None:
    """The device of this rank: one GPU each where a run of several names none in particular.

    Raises:
        ValueError: several ranks of this machine would share a GPU: the name is of one, or there
            are fewer.
    """
    local, here = os.environ.get("LOCAL_RANK"), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if here > 1 and name is not None and ":" in name and not name.startswith("cpu"):
        raise ValueError(
            f"--device {name} is one device, and {here} processes would share it: leave --device "
            "out, and each takes its own"
        )
    if local is None or name not in (None, "cuda") or not torch.cuda.is_available():
        return name
    gpus = torch.cuda.device_count()
    # torchrun gives all of a machine one environment. Another launcher may let each process see a
    # GPU of its own, all of them number 0.
    if here > gpus and "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError(
            f"--nproc-per-node is {here}, and this machine shows {gpus} GPU{'s' * (gpus > 1)}: "
            "start one process for each, or give --device cpu"
        )
    return f"cuda:{int(local) % gpus}"


def is_lost_rank_error(error: Exception) -> bool:
    """Whether another process's end is what an error, of anything that computes, tells of.

    gloo has no type for it, only the file that a connection broke in; NCCL a sentence.
    """
    signs = ("gloo/transport", "remote process exited")
    told = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    return told or isinstance(error, RankLost)


@contextlib.contextmanager
def lost_ranks_named() -> Iterator[None]:
    """Around what talks to the other processes on its own, as a training does.

    Raises:
        RankLost: a process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RankLost) or not is_lost_rank_error(error):
            raise
        raise RankLost(f"{_LOST} ({str(error).splitlines()[0]})") from None


@contextlib.contextmanager
def _losses_named() -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankLost(f"{_LOST} ({str(error).splitlines()[0]})") from None


def _terminated(*_: Any) -> None:
    raise RankLost(f"{_LOST} (ended by the launcher)")
