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
from longrope.pipeline.plan import ContextPlan, make_plan
from longrope.pipeline.recipe import Recipe
from longrope.units import duration, gigabytes

_SECONDS = 0.2  # measured for each kind of work
# Norms, activations and copies, which the FLOPs do not count.
# With this factor the stages of the default run took 0.6 to 2.1 times the predicted time
# (docs/results.md).
_OVERHEAD = 1.5


@dataclasses.dataclass(frozen=True)
class Rates:
    """Speeds for time estimates, in FLOPs per second: products with weights, causal attention."""

    linear: float
    attention: float

    def seconds(self, stage: Stage) -> float:
        return _OVERHEAD * (stage.linear / self.linear + stage.attention / self.attention)


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

    def of(self, stage: Stage) -> int:
        """Return the free bytes that a stage can use: of one device, or of all in FSDP training."""
        if stage.kind != "finetune":
            return self.each
        return self.each * self.devices - stage.replicated * (self.devices - 1)


def check_memory(stages: Sequence[Stage], memory: Memory, options: bool = False) -> None:
    """Refuse stages whose estimated memory exceeds the free memory.

    Args:
        options: spell the remedies as command-line options instead of recipe keys.

    Raises:
        ValueError: names the stage, the memory it needs, the memory there is, and the remedies.
    """

    def tried(*helps: str) -> str:
        shorter = "a smaller --target"
        if options and stage.kind == "evaluate":
            shorter = "shorter --lengths"
        if options:
            helps = tuple(_as_option(help) for help in helps)
        return ", ".join((*helps, shorter, "or a larger machine"))

    for stage in stages:
        if memory.devices > 1 and stage.unshared > memory.each:
            raise ValueError(
                f"{stage.name} starts with the whole model on every device, "
                f"{gigabytes(stage.unshared)} before FSDP shares it out, and "
                f"{gigabytes(memory.each)} are free on each; try finetune.precision pure-bf16, "
                "finetune.distill false, or larger GPUs"
            )
        free = memory.of(stage)
        if stage.memory > free:
            helps = tried(*stage.helps)
            if stage.kind == "finetune":
                helps = "finetune.lora, finetune.precision pure-bf16, or FSDP over more GPUs"
                if stage.replicated:
                    helps = f"finetune.distill false, {helps}"
                helps = ", ".join((*stage.helps, helps))
            raise ValueError(
                f"{stage.name} at {stage.length:,} tokens needs about {gigabytes(stage.memory)} "
                f"and {gigabytes(free)} are free; try {helps}"
            )
        less = [help for help in stage.helps if "algorithm" in help]
        if memory.host is not None and stage.host > memory.host:
            raise ValueError(
                f"{stage.name} at {stage.length:,} tokens keeps about {gigabytes(stage.host)} in "
                f"the host's memory, and {gigabytes(memory.host)} of it are free for each process; "
                f"try {tried('execution.offload_activations DIRECTORY', *less)}"
            )
        if memory.disk is not None and stage.disk > memory.disk:
            raise ValueError(
                f"{stage.name} at {stage.length:,} tokens keeps about {gigabytes(stage.disk)} in "
                f"files, and {gigabytes(memory.disk)} of that disk are free for each process; try "
                f"a directory on a larger one, {tried(*less)}"
            )


def _as_option(remedy: str) -> str:
    """Write a remedy for too little memory, a recipe key, as an option of the command line."""
    key, value = remedy.rpartition(".")[2].split()
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


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Estimate of a plan: the time of each stage on this machine, and the memory available."""

    plan: ContextPlan
    rates: Rates
    training_rates: Rates
    memory: Memory
    advice: str = ""

    def seconds(self, stage: Stage) -> float:
        """Return the estimated seconds of a stage."""
        rates = self.training_rates if stage.kind == "finetune" else self.rates
        return rates.seconds(stage)

    def table(self) -> Table:
        """Return the estimate as the table that ``longrope plan`` prints."""
        elsewhere = any(stage.host or stage.disk for stage in self.plan.stages)
        heads = ["stage", "length", "tokens", "FLOPs", "memory"]
        heads += ["offloaded"] if elsewhere else []
        table = Table(*heads, "time (estimate)")
        total = 0.0
        for stage in self.plan.stages:
            seconds = self.seconds(stage)
            total += seconds
            flops = stage.linear + stage.attention
            waits = stage.host or stage.disk
            table.add_row(
                stage.name,
                f"{stage.length:,}",
                f"{stage.tokens:,}",
                f"{flops:.2g}" if flops else "",
                gigabytes(stage.memory) if stage.memory else "",
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
    gpus: str | None = None,
    ranks: Ranks | None = None,
) -> Estimate:
    """Measure this machine and estimate the time and memory of a plan.

    Args:
        gpus: GPUs to plan for instead of this machine, in gigabytes: ``80GB`` or ``8x80GB``.
        ranks: the processes that share the work.

    Raises:
        ValueError: ``gpus`` is not an amount of memory.
    """
    device = find_device(local_device(recipe.execution.device))
    name = info.dtype if recipe.execution.dtype == "auto" else recipe.execution.dtype
    training = "float32" if recipe.finetune.precision == "float32" else "bfloat16"
    rates = {
        dtype: calibrate(info, device, getattr(torch, dtype))
        for dtype in {"float32", name, training}
    }
    ranks = ranks or Ranks()
    memory = available(device, ranks.size, recipe.execution.offload_activations)
    if gpus is not None:
        # for GPUs, whatever this machine has
        plan = make_plan(info, recipe, group_size=ranks.group.size)
        count, _, size = gpus.lower().removesuffix("gb").rpartition("x")
        try:
            memory = Memory(int(float(size) * 1e9), int(count or 1))
        except (ValueError, OverflowError):
            raise ValueError(f"gpus is {gpus!r}; give gigabytes, such as 80GB or 8x80GB") from None
    used = {"execution.dtype": name, "finetune.precision": training}
    if plan.trained is None:
        del used["finetune.precision"]
    slow = [key for key, dtype in used.items() if rates["float32"].linear > 2 * rates[dtype].linear]
    advice = ""
    if slow:
        ratio = rates["float32"].linear / min(rates[used[key]].linear for key in slow)
        advice = (
            f"float32 is {ratio:.0f} times as fast on this machine: set "
            f"{' and '.join(f'{key}: float32' for key in slow)} in the recipe"
        )
    return Estimate(plan, rates[name], rates[training], memory, advice)
