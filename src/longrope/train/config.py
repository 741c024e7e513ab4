"""How to train: what a recipe's ``finetune`` section and the trainer both go by."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

_Count = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1)]


class FinetuneSettings(BaseModel):
    """The defaults are the paper's for LLaMA2 (section 4.1 and its code).

    ``batch`` counts pieces a step over all processes; ``micro_batch`` of them go through
    a device at a time. ``precision``: bf16 is float32 weights under bf16 autocast,
    pure-bf16 keeps the weights in bf16 too. ``lora`` is a rank. ``passkey_share``,
    ``answer_share`` and ``short_share`` (tokens of short windows per token of a long piece)
    are not the paper's; see :class:`~longrope.train.dataset.LongContextDataset`.
    Nor is ``distill``: short
    windows learn the predictions of the model as it came, in place of the text (after LongReD,
    arXiv 2502.07365, which distils hidden states).

    Raises:
        ValueError: a field out of range, or none of these; names it and its value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    steps: _Count = 400
    batch: _Count = 32
    micro_batch: _Count = 1
    learning_rate: _Positive = 2e-5
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    warmup: Annotated[int, Field(ge=0)] = 20
    clip: _Positive = 1.0
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    precision: Literal["bf16", "pure-bf16", "float32"] = "bf16"
    gradient_checkpointing: bool = True
    passkey_share: _Share = 0.0
    answer_share: _Share = 0.0
    short_share: _Share = 0.0
    distill: bool = False
    save_every: _Count = 50
    lora: _Count | None = None

    def accumulation(self, processes: int) -> int:
        """Micro-batches a step on each process.

        Raises:
            ValueError: the batch is not shared out evenly.
        """
        together = self.micro_batch * processes
        if self.batch % together:
            raise ValueError(
                f"finetune.batch is {self.batch}; it must be a multiple of micro_batch × "
                f"processes, {self.micro_batch} × {processes}"
            )
        return self.batch // together
