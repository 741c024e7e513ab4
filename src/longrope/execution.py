"""Where and how a model computes: device, dtype, offloading, processes. Imports no torch."""

from typing import Literal

from pydantic import Field

from longrope.base_config import Config


class ExecutionConfig(Config):
    """Configuration of execution: device, dtype, chunk size and offloading.

    Only ``dtype`` changes results beyond rounding.

    Example:
        >>> ExecutionConfig(dtype="bfloat16", chunk_size=4096).device is None
        True
    """

    device: str | None = Field(
        default=None, description="Device such as cpu or cuda:1; default: a GPU if there is one."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Dtype of the model; auto is the checkpoint's."
    )
    chunk_size: int | None = Field(
        default=None,
        ge=1,
        description="Tokens per forward pass of one layer; default 8192 on a GPU, else 2048.",
    )
    offload_activations: str | None = Field(
        default=None, description="Offload hidden states to 'cpu' or to a directory."
    )
    offload_weights: bool = Field(
        default=False,
        description="Keep the weights on the host, two layers at a time on the device.",
    )
    sequence_parallel: int = Field(
        default=1, ge=1, description="Number of torchrun processes that share each sequence."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with the model."
    )
