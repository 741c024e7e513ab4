"""Estimate the time and memory of a plan on this machine, and refuse what does not fit."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from rich.table import Table

from longrope.distributed import Ranks, local_device, local_processes, sharded
from longrope.layerwise.activation_storage import free_on_disk
from longrope.models.devices import find_device
from longrope.models.info import ModelInfo
from longrope.pipeline.costs import Stage
from longrope.pipeline.plan import ContextPlan
from longrope.pipeline.recipe import Recipe
from longrope.units import duration, gigabytes

_SECONDS = 0.2  # measured for each kind of work
# Norms, activations and copies, which the FLOPs do not count.
# With this factor the stages of the default run took 0.6 to 2.1 times the predicted time
# (docs/results.md).
_OVERHEAD = 1.5


@dataclasses.dataclass(frozen=True)
class Rates:
    """Speeds for time estimates, in FLOPs per second: products with weights, causal attention.

    ``overhead`` multiplies the time, for work that the FLOPs do not count.
    """

    linear: float
    attention: float
    overhead: float = _OVERHEAD

    def seconds(self, stage: Stage) -> float:
        return self.overhead * (stage.linear / self.linear + stage.attention / self.attention)


# Of whole forward passes of LLaMA2-7B's shape in bfloat16 (docs/performance.md, "On a GPU").
H100 = Rates(4.2e14, 5.8e14, overhead=1.0)


def calibrate(info: ModelInfo, device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure the FLOPs per second of a device, to estimate the time of each stage."""
    # A GPU needs large products to be busy; on a CPU those can take minutes in bfloat16.
    most, rows = (4096, 2048) if device.type == "cuda" else (1024, 256)
    width = min(info.hidden_size, most)
    left = torch.randn(rows, width, device=device, dtype=dtype)
    right = torch.randn(width, 4 * width, device=device, dtype=dtype)
    linear = _rate(lambda: left @ right, 2.0 * rows * width * 4 * width, device)
    tokens = 4096
    query = torch.randn(1, info.heads, tokens, info.head_dim, device=device, dtype=dtype)
    flops = 4.0 * info.heads * info.head_dim * tokens * tokens / 2
    attention = _rate(
        lambda: F.scaled_dot_product_attention(query, query, query, is_causal=True), flops, device
    )
    return Rates(linear, attention)


def _rate(work, flops: float, device: torch.device) -> float:
    work()  # warm-up: threads start and kernels are chosen
    times = []
    started = time.monotonic()
    while not times or time.monotonic() - started < _SECONDS:
        before = time.monotonic()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.monotonic() - before)
    return flops / sorted(times)[(len(times) - 1) // 2]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Free memory that estimates are compared with, in bytes.

    Args:
        each: on one device. On a CPU, this process's share of the host's memory.
        devices: number of devices that FSDP shards training over.
        host: this process's share of the host's memory; None if unknown.
        disk: in the directory for offloaded activations; None if there is none.
    """

    each: int
    devices: int = 1
    host: int | None = None
    disk: int | None = None

    def share(self, stage: Stage) -> float:
        """Return the peak bytes of a stage on one device. FSDP shards what is not replicated."""
        if stage.kind != "finetune":
            return stage.memory
        return (stage.memory - stage.replicated) / self.devices + stage.replicated


def check_memory(stages: Sequence[Stage], memory: Memory, options: bool = False) -> None:
    """Refuse stages whose estimated memory exceeds the free memory.

    Args:
        options: spell the remedies as options of a verb without recipe.

    Raises:
        ValueError: names every such stage, the memory it needs and that there is, and remedies.
    """
    problems = [text for stage in stages if (text := problem(stage, memory, options))]
    if problems:
        raise ValueError("; ".join(problems))


def problem(stage: Stage, memory: Memory, options: bool = False) -> str:
    """Return why a stage does not fit into the memory, and the remedies; empty if it fits."""
    at = f"{stage.name} at {stage.length:,} tokens"
    less = [help for help in stage.helps if "algorithm" in help]
    if memory.devices > 1 and stage.unshared > memory.each:
        return (
            f"{stage.name} starts with the whole model on every device, "
            f"{gigabytes(stage.unshared)} before FSDP shares it out, and "
            f"{gigabytes(memory.each)} are free on each; "
            + _remedies(["finetune.precision=pure-bf16", "finetune.distill=false"], options)
            + ", or larger GPUs"
        )
    if memory.share(stage) > memory.each:
        shorter = "shorter `lengths`" if options and stage.kind == "evaluate" else ""
        each = " on each device" if memory.devices > 1 else ""
        return (
            f"{at} needs about {gigabytes(memory.share(stage))} and {gigabytes(memory.each)} are "
            f"free{each}; {_remedies(stage.helps, options)}, {shorter or 'a smaller `target`'}, or "
            "a larger machine"
        )
    if memory.host is not None and stage.host > memory.host:
        helps = ["execution.offload_activations=DIRECTORY", *less]
        return (
            f"{at} keeps about {gigabytes(stage.host)} in the host's memory, and "
            f"{gigabytes(memory.host)} of it are free for each process; "
            f"{_remedies(helps, options)}, a smaller `target`, or a larger machine"
        )
    if memory.disk is not None and stage.disk > memory.disk:
        return (
            f"{at} keeps about {gigabytes(stage.disk)} in files, and {gigabytes(memory.disk)} of "
            f"that disk are free for each process; {_remedies(less, options)}, a directory on a "
            "larger one, or a smaller `target`"
        )
    return ""


def _remedies(helps: Sequence[str], options: bool) -> str:
    """Write remedies for too little memory, recipe keys and values, as the user gives them."""
    if not helps:
        return "nothing in the recipe lowers it"
    if options:
        return "try " + ", ".join(map(_as_option, helps))
    return "try " + ", ".join(f"`set` {help}" for help in helps)


def _as_option(remedy: str) -> str:
    """Write a remedy for too little memory, a recipe key, as an option of the command line."""
    key, value = remedy.rpartition(".")[2].split("=")
    return f"--{key.replace('_', '-')}" + (f" {value}" if value != "true" else "")


def available(
    device: torch.device, processes: int = 1, offload_activations: str | None = None
) -> Memory:
    """Measure the free memory of this process's device, host and offload directory."""
    host = psutil.virtual_memory().available // local_processes()
    disk = free_on_disk(offload_activations)
    if device.type != "cuda":
        return Memory(host, disk=disk)
    return Memory(torch.cuda.mem_get_info(device)[0], processes if sharded() else 1, host, disk)


def parse_gpus(text: str) -> Memory:
    """Parse GPUs to plan for: ``80GB`` is one with so much memory, ``8x80GB`` eight.

    Raises:
        ValueError: not an amount of memory.
    """
    count, _, size = text.lower().removesuffix("gb").rpartition("x")
    try:
        memory = Memory(int(float(size) * 1e9), int(count or 1))
        if min(memory.each, memory.devices) < 1:
            raise ValueError("no GPU, or none with memory")
        return memory
    except (ValueError, OverflowError):
        raise ValueError(f"gpus is {text!r}; give gigabytes, such as 80GB or 8x80GB") from None


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Estimate of a plan: the time of each stage, and the memory available.

    Args:
        rates: speeds of everything but training.
        training_rates: speeds of training.
        memory: of this machine, or of the GPUs that are planned for.
        processes: that share the work of the stages which can be shared.
        notes: sentences for the user.
    """

    plan: ContextPlan
    rates: Rates
    training_rates: Rates
    memory: Memory
    processes: int = 1
    notes: tuple[str, ...] = ()

    def seconds(self, stage: Stage) -> float:
        """Return the estimated seconds of a stage.

        Searches are counted for one process: gradient steps follow each other.
        """
        rates = self.training_rates if stage.kind == "finetune" else self.rates
        shared = self.processes if stage.kind in ("finetune", "evaluate") else 1
        return rates.seconds(stage) / shared

    def table(self) -> Table:
        """Return the estimate as the table that ``longrope plan`` prints."""
        elsewhere = any(stage.host or stage.disk for stage in self.plan.stages)
        each = "each GPU's memory" if self.memory.devices > 1 else "memory"
        heads = ["stage", "length", "tokens", "FLOPs", each]
        heads += ["offloaded"] if elsewhere else []
        table = Table(*heads, "time (estimate)")
        total = 0.0
        for stage in self.plan.stages:
            seconds = self.seconds(stage)
            total += seconds
            flops = stage.linear + stage.attention
            waits = stage.host or stage.disk
            fits = "" if not problem(stage, self.memory) else " (does not fit)"
            table.add_row(
                stage.name,
                f"{stage.length:,}",
                f"{stage.tokens:,}",
                f"{flops:.2g}" if flops else "",
                gigabytes(self.memory.share(stage)) + fits if stage.memory else "",
                *([gigabytes(waits) if waits else ""] if elsewhere else []),
                duration(seconds) if flops else "",
            )
        table.add_row("all", *[""] * (len(heads) - 1), duration(total))
        return table

    def to_json(self) -> dict[str, Any]:
        """Return the estimate of a plan as plain data."""
        return {
            "memory": dataclasses.asdict(self.memory),
            "stages": [
                dataclasses.asdict(stage) | {"seconds": self.seconds(stage)}
                for stage in self.plan.stages
            ],
        }

    def check(self) -> None:
        """Refuse the estimated plan if it does not fit into the memory."""
        check_memory(self.plan.stages, self.memory)


def estimate_plan(
    plan: ContextPlan,
    info: ModelInfo,
    recipe: Recipe,
    gpus: Memory | None = None,
    ranks: Ranks | None = None,
) -> Estimate:
    """Estimate the time and memory of a plan, on this machine or on GPUs.

    This machine's speed is measured. GPUs have that of this machine's, or else an H100's, which
    was measured on whole forward passes.

    Args:
        gpus: GPUs that the plan is for, instead of this machine.
        ranks: the processes that share the work.
    """
    device = find_device(local_device(recipe.execution.device))
    processes = (ranks or Ranks()).size
    if gpus is not None and device.type == "cpu":
        note = (
            "Hours are those of an H100, whose forward passes were measured; training is priced "
            "at the same speed. Other GPUs take longer or less in proportion to their speed."
        )
        return Estimate(plan, H100, H100, gpus, gpus.devices, (note,))
    name = info.dtype if recipe.execution.dtype == "auto" else recipe.execution.dtype
    single = recipe.finetune.precision_on(device.type) == "float32"
    training = "float32" if single else "bfloat16"
    rates = {
        dtype: calibrate(info, device, getattr(torch, dtype))
        for dtype in {"float32", name, training}
    }
    memory = gpus or available(device, processes, recipe.execution.offload_activations)
    used = {"execution.dtype": name, "finetune.precision": training}
    if plan.trained is None:
        del used["finetune.precision"]
    slow = [key for key, dtype in used.items() if rates["float32"].linear > 2 * rates[dtype].linear]
    notes = []
    if slow:
        ratio = rates["float32"].linear / min(rates[used[key]].linear for key in slow)
        notes.append(
            f"float32 is {ratio:.0f} times as fast on this machine: "
            + " ".join(f"--set {key}=float32" for key in slow)
        )
    processes = gpus.devices if gpus else processes
    return Estimate(plan, rates[name], rates[training], memory, processes, tuple(notes))
