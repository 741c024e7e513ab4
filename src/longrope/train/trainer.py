"""Fine-tune at the searched length with transformers' Trainer under accelerate.

One rescale is used for every length while training (short = long), so all processes use the
same. Checkpoints are resumed from only if they have a marker, which is written last, so
checkpoints cut short by a kill or a full disk are ignored.
"""

import contextlib
import copy
import hashlib
import importlib.util
import json
import logging
import math
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from longrope.distributed import Ranks, detect_lost_ranks, is_lost_rank_error, sharded
from longrope.files.atomic import atomic_directory, write_atomically
from longrope.files.parse import read_json
from longrope.files.stores import append_line, read_lines
from longrope.models.load import LoadedModel
from longrope.models.parameters import is_tied, text_parameters
from longrope.models.sources import loaded_from
from longrope.models.weights import add_tensors, prediction_tensors, stored_tensors
from longrope.progress import Advance, console, progress, quiet, seconds_left
from longrope.rope.apply import rescaled
from longrope.rope.rescale import Rescale
from longrope.train.config import FinetuneConfig
from longrope.train.dataset import LongContextDataset
from longrope.train.loss import chunked_loss
from longrope.units import duration

log = logging.getLogger(__name__)
_MARKER = "complete.json"


def finetune(
    loaded: LoadedModel,
    rescale: Rescale,
    short: Rescale | None,
    dataset: LongContextDataset,
    settings: FinetuneConfig,
    out: Path,
    ranks: Ranks,
    *,
    teacher: LoadedModel | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Fine-tune a model with transformers' Trainer under a rescale, or resume its training.

    Training resumes from the last complete checkpoint. Writes ``out/model``, a checkpoint
    in the original dtype with an unscaled config, and ``out/loss.jsonl`` with a line per step.

    Args:
        loaded: the model to train.
        rescale: applied to the long sequences.
        short: applied to the short windows; None for the original RoPE.
        dataset: the training sequences.
        settings: training configuration.
        out: output directory.
        ranks: the processes that train together.
        teacher: its predictions are the short windows' targets.
        seed: random seed.

    Returns:
        The lines of ``out/loss.jsonl``.

    Raises:
        ValueError: the loss is not finite, the disk is full, or the batch cannot be divided.
        RankLost: another process died; checkpoints written so far are kept.
    """
    work = out / "checkpoints"
    if (out / "model").exists():  # complete, as it is renamed into place
        if ranks.first:
            shutil.rmtree(work, ignore_errors=True)
        return read_lines(out / "loss.jsonl")
    resume, log = _last_complete(work, ranks), out / "loss.jsonl"
    if ranks.first:
        repeated = _drop_losses_after(resume, log)
        if resume is not None:
            again = f"; {repeated} steps are repeated" if repeated else ""
            console.print(f"resuming after step {_step(resume)} of {settings.steps}{again}")
        elif repeated:
            console.print(f"no whole checkpoint: {repeated} steps are repeated")
    model = loaded.model
    config = copy.deepcopy(model.config)  # training changes it
    precision = settings.precision_on(model.device.type)
    source = loaded_from(loaded.info.source)
    dtypes = _dtypes(loaded, source)
    untrained = source and (source, prediction_tensors(source, config.get_text_config()))
    weights = torch.bfloat16 if precision == "pure-bf16" else torch.float32
    if model.dtype is not weights:  # otherwise what it keeps in float32 stays so
        model.to(weights)
    if sharded():  # FSDP takes parameters of one dtype
        for parameter in model.parameters():
            parameter.data = parameter.data.to(weights)
    if settings.lora is not None:
        torch.manual_seed(seed)  # adapters are initialised before the Trainer seeds
        model = _with_lora(model, settings.lora)
    _freeze_unused(loaded.model)
    arguments = _arguments(settings, work, model.device, ranks, seed)
    # On the Trainer's device, and frozen, as autocast caches copies of trainable weights.
    if teacher is not None:
        teacher.model.to(arguments.device).requires_grad_(False)
    with (
        # position_override requires the rescale to be in place.
        rescaled(loaded.model, rescale, always=dataset.reach > 0),
        chunked_loss(model, short, teacher=teacher and teacher.model),
        progress("fine-tune", settings.steps, show=ranks.first) as advance,
        detect_lost_ranks(),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", module="(accelerate|torch)\\.")
        callback = _StepCallback(log, settings.steps, advance, ranks.first)
        with _stopping_after_a_step(callback, alone=ranks.size == 1):
            trainer = _run_trainer(model, arguments, dataset, callback, resume)
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    model = _unwrapped(trainer)
    if settings.lora is not None:
        model, state = model.merge_and_unload(), None
    if ranks.first:
        model.config = config
        _save(model, state, loaded, dtypes, untrained, out / "model")
        shutil.rmtree(work, ignore_errors=True)
    if callback.stops:
        raise KeyboardInterrupt
    return read_lines(log)


@contextlib.contextmanager
def _stopping_after_a_step(callback: "_StepCallback", alone: bool) -> Iterator[None]:
    """On Ctrl-C finish the training step, write its checkpoint, and stop; a second one stops now.

    Several processes would not all be at the same step, so they stop at once.
    """
    if not alone or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGINT, before)
        callback.stops = True
        console.print("stopping after this step; press Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if callback.stops and callback.step < callback.steps:
        console.print(f"the checkpoint of step {callback.step} is written: nothing is repeated")
        raise KeyboardInterrupt  # after the last step, the model is written first


def _run_trainer(
    model: Any,
    arguments: TrainingArguments,
    dataset: LongContextDataset,
    callback: "_StepCallback",
    resume: Path | None,
) -> Trainer:
    with quiet():
        trainer = _Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[callback])
        trainer.remove_callback(PrinterCallback)
        trainer.model_accepts_loss_kwargs = False
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def _unwrapped(trainer: Trainer) -> Any:
    """Return the Trainer's model without accelerate's wrappers."""
    return trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)


def _dtypes(loaded: LoadedModel, source: Path | None) -> dict[str, torch.dtype]:
    """Return the dtype to save each tensor in: float32 if stored so, else the model's.

    Some checkpoints keep single tensors in float32, such as the expert biases of DeepSeek-V3.
    """
    own, kept = getattr(torch, loaded.info.dtype), set()
    if source:
        kept = {name for name, part in stored_tensors(source) if part.get_dtype() == "F32"}
    return {name: torch.float32 if name in kept else own for name in loaded.model.state_dict()}


def _save(
    model: Any,
    state: dict[str, Any] | None,
    loaded: LoadedModel,
    dtypes: dict[str, torch.dtype],
    untrained: tuple[Path, list[str]] | None,
    path: Path,
) -> None:
    """Write the model that the Trainer trained, in its original dtypes, with its tokenizer.

    Args:
        untrained: where the model was loaded from, and tensors to copy from there.
    """
    state = {
        name.replace("_orig_mod.", ""): tensor.detach().cpu()  # as torch.compile calls them
        for name, tensor in (state or model.state_dict()).items()
    }
    state = {n: t.to(dtypes[n]) if t.is_floating_point() else t for n, t in state.items()}
    before = model.config.dtype
    with atomic_directory(path) as directory, quiet():
        model.save_pretrained(directory, state_dict=state)
        if untrained is not None:
            add_tensors(*untrained, directory)
        loaded.tokenizer.save_pretrained(directory)
        config = directory / "config.json"  # it names the dtype of the training
        content = read_json(config) | {"dtype": loaded.info.dtype}
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    model.config.dtype = before


def _arguments(
    settings: FinetuneConfig, work: Path, device: torch.device, ranks: Ranks, seed: int
) -> TrainingArguments:
    """Translate the settings into the TrainingArguments of transformers' Trainer."""
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.accumulation(ranks.size),
        learning_rate=settings.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(
            settings.schedule, settings.schedule
        ),
        warmup_steps=min(settings.warmup, settings.steps // 2),
        optim="adamw_torch",
        weight_decay=0.0,
        adam_beta2=settings.beta2,
        adam_epsilon=1e-8,
        max_grad_norm=settings.clip,
        bf16=settings.precision_on(device.type) == "bf16",
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=settings.save_every,
        save_total_limit=2,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        disable_tqdm=True,
        report_to=[],
        seed=seed,
        data_seed=seed,
        use_cpu=device.type == "cpu",
    )
    # Where bf16 is off, accelerate would read ACCELERATE_MIXED_PRECISION.
    arguments.mixed_precision = "bf16" if arguments.bf16 else "no"
    # One device per process: the Trainer would use DataParallel over all visible ones.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


class _Trainer(Trainer):
    """transformers' Trainer that reports full disks and non-finite losses as ``ValueError``."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save a Trainer checkpoint; raises ``ValueError`` if it cannot be written."""
        try:
            super()._save_checkpoint(*args, **kwargs)
        # A full disk is an OSError in Python, but other errors in torch and safetensors.
        except (OSError, RuntimeError, SafetensorError) as error:
            if is_lost_rank_error(error):
                raise
            raise ValueError(
                f"{self.args.output_dir}: cannot be written ({str(error).splitlines()[0]}): free "
                "space there and run the same command again to resume from the last checkpoint"
            ) from error

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a step of the Trainer; raises ``ValueError`` if the loss is not finite."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise _not_finite("loss", loss.item(), self.state.global_step + 1)
        return loss


def _not_finite(what: str, value: float, step: int) -> ValueError:
    return ValueError(
        f"the {what} is {value} at step {step}; checkpoints before it are kept: lower "
        "finetune.learning_rate or set finetune.precision to float32, with another "
        "output directory"
    )


class _StepCallback(TrainerCallback):
    """Trainer callback: logs each step's loss, shows progress, marks complete checkpoints."""

    def __init__(self, log: Path, steps: int, advance: Advance, first: bool):
        self.log, self.steps, self.advance, self.first = log, steps, advance, first
        self.stops, self.step = False, 0
        self.step_ended = time.monotonic()
        self.measured: list[tuple[float, float]] = []  # (1 step, its seconds)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note when the Trainer started."""
        self.step_ended = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write a checkpoint and end the training if it was interrupted."""
        self.step = state.global_step
        if self.stops:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Log the loss of a training step; raises ``ValueError`` if its gradient is not finite."""
        if not logs or "loss" not in logs:
            return
        norm = float(logs.get("grad_norm", 0.0))
        if not math.isfinite(norm):
            raise _not_finite("gradient", norm, state.global_step)
        if not self.first:
            return
        line = {
            "step": state.global_step,
            "loss": float(logs["loss"]),
            "learning_rate": float(logs["learning_rate"]),
            "grad_norm": norm,
        }
        append_line(self.log, line)
        now = time.monotonic()
        self.measured.append((1, now - self.step_ended))
        self.step_ended = now
        left = seconds_left(self.measured, self.steps - state.global_step)
        assert left is not None
        self.advance(state.global_step, f"loss {line['loss']:.4f}, {duration(left)} left")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Flush a Trainer checkpoint to disk, then mark it complete."""
        if dist.is_initialized():
            dist.barrier()  # other ranks write files of their own
        if not self.first:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        files = _digests(checkpoint)
        for name in files:
            with (checkpoint / name).open("rb") as handle:
                os.fsync(handle.fileno())
        content = {"step": state.global_step, "files": files}
        write_atomically(checkpoint / _MARKER, json.dumps(content) + "\n")


def _digests(checkpoint: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a Trainer checkpoint but its marker, by name."""
    digests = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != _MARKER:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
            digests[path.relative_to(checkpoint).as_posix()] = digest.hexdigest()
    return digests


def _last_complete(work: Path, ranks: Ranks) -> Path | None:
    """Return the newest whole Trainer checkpoint; incomplete and damaged ones are deleted.

    A damaged one, whose files are not those that its marker lists, is named.
    """
    name, damaged = None, False
    for directory in sorted(work.glob("checkpoint-*"), key=_step) if ranks.first else ():
        marked = (directory / _MARKER).exists()
        if marked and _is_whole(directory):
            name = directory.name
            continue
        if marked:
            damaged = True
            log.warning("%s is damaged and is not used", directory)
        shutil.rmtree(directory, ignore_errors=True)
    if damaged and name is None:
        log.warning("no whole checkpoint is left: training starts from its first step")
    name = ranks.broadcast(name)
    return None if name is None else work / name


def _is_whole(checkpoint: Path) -> bool:
    try:
        content = json.loads((checkpoint / _MARKER).read_text(encoding="utf-8"))
        # Markers of earlier versions list no files.
        return content.get("files", {}).items() <= _digests(checkpoint).items()
    except (OSError, ValueError, AttributeError):
        return False


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _drop_losses_after(checkpoint: Path | None, log: Path) -> int:
    """Drop the logged losses of training steps after a checkpoint; return how many these are."""
    last, before = _step(checkpoint) if checkpoint else 0, read_lines(log)
    lines = [line for line in before if line["step"] <= last]
    write_atomically(log, "".join(json.dumps(line) + "\n" for line in lines))
    return len(before) - len(lines)


def require_lora(rank: int) -> None:
    """Check that LoRA training is possible.

    Raises:
        ValueError: peft is not installed, or the model is to be sharded.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError(
            f"finetune.lora is {rank}, which requires peft: pip install 'longrope[lora]'"
        )
    if sharded():
        raise ValueError(
            f"finetune.lora is {rank} and ACCELERATE_USE_FSDP is true: adapters cannot be merged "
            "into a sharded model: start the processes without FSDP or set finetune.lora to null"
        )


def _freeze_unused(model: Any) -> None:
    """Freeze, before training on text, the parameters that get no gradients (vision, audio)."""
    met = text_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in met)


def _with_lora(model: Any, rank: int) -> Any:
    """Add LoRA to every linear layer for training; embeddings and norms train in full.

    This follows LongLoRA.
    """
    require_lora(rank)
    from peft import LoraConfig, get_peft_model  # type: ignore[import-not-found]

    whole = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) or "norm" in type(module).__name__.lower()
    }
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        modules_to_save=sorted(whole),
        # Embeddings that are tied to the head stay tied.
        ensure_weight_tying=is_tied(model),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # PEFT uses a deprecated name of transformers, and sets patterns of its own in vain.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "The following .*_pattern keys")
        return get_peft_model(model, config)
