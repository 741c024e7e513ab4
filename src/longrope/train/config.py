"""Training configuration of fine-tuning: steps, batch, learning rate, precision, loss."""

from typing import Annotated, Literal

from pydantic import Field

from longrope.base_config import Config

_Count = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1)]


class FinetuneConfig(Config):
    """Training configuration; defaults are the paper's for LLaMA2 (section 4.1, its code).

    ``passkey_share``, ``answer_share``, ``short_share`` and ``distill`` are not in the paper.

    Args:
        steps: optimiser steps.
        batch: sequences per step, over all processes.
        micro_batch: sequences per forward pass on one device.
        learning_rate: peak learning rate.
        schedule: learning rate schedule after the warm-up.
        warmup: warm-up steps.
        clip: gradient norm limit.
        beta2: Adam's β₂.
        precision: ``bf16`` is float32 weights under bfloat16 autocast; ``pure-bf16`` also keeps
            the weights in bfloat16. ``auto`` is float32 on a CPU and bf16 elsewhere.
        gradient_checkpointing: recompute activations in the backward pass.
        passkey_share: share of passkey prompts among the sequences.
        answer_share: weight of a passkey prompt's answer in the loss, as a share of its tokens.
        short_share: tokens of short windows per token of a long sequence.
        distill: short windows learn the original model's predictions instead of the text (after
            LongReD, arXiv 2502.07365, which distils hidden states).
        save_every: steps between checkpoints.
        lora: LoRA rank; None trains all weights.
    """

    steps: _Count = 400
    batch: _Count = 32
    micro_batch: _Count = 1
    learning_rate: _Positive = 2e-5
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    warmup: Annotated[int, Field(ge=0)] = 20
    clip: _Positive = 1.0
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    precision: Literal["auto", "bf16", "pure-bf16", "float32"] = "auto"
    gradient_checkpointing: bool = True
    passkey_share: _Share = 0.0
    answer_share: _Share = 0.0
    short_share: _Share = 0.0
    distill: bool = False
    save_every: _Count = 50
    lora: _Count | None = None

    def precision_on(self, device: str) -> str:
        """Return the precision of training on a kind of device, such as ``cpu`` or ``cuda``."""
        if self.precision != "auto":
            return self.precision
        return "float32" if device == "cpu" else "bf16"

    def accumulation(self, processes: int) -> int:
        """Return the gradient accumulation steps per process under this training configuration.

        Raises:
            ValueError: the batch cannot be divided evenly.
        """
        together = self.micro_batch * processes
        if self.batch % together:
            raise ValueError(
                f"finetune.batch is {self.batch}; it must be a multiple of micro_batch × "
                f"processes, {self.micro_batch} × {processes}"
            )
        return self.batch // together
