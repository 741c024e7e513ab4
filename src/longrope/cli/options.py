"""Command-line options that several verbs share."""

from typing import Annotated, Any

import typer

Model = Annotated[
    str, typer.Argument(help="Directory, hub id, GGUF file, or 'bundled'.", metavar="[MODEL]")
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Text file, directory, JSON, JSONL, Parquet or hub dataset id; repeatable. Default: "
        "the Python library of this machine.",
    ),
]
Field = Annotated[str, typer.Option(help="Text field in JSON, JSONL, Parquet and datasets.")]
Pack = Annotated[
    bool, typer.Option("--pack", help="Join documents into windows, with BOS and EOS between them.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
Device = Annotated[
    str | None, typer.Option(help="Device such as cpu or cuda:1. Default: a GPU if there is one.")
]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Chunk = Annotated[
    int | None,
    typer.Option(help="Tokens per forward of one layer. Default: 2,048, on a GPU 8,192."),
]
OffloadActivations = Annotated[
    str | None, typer.Option(help="Offload hidden states to 'cpu' or to a directory.")
]
Offload = Annotated[
    str | None,
    typer.Option(
        help="'weights': keep the weights on the host, two layers at a time on the device."
    ),
]
SequenceParallel = Annotated[
    int, typer.Option(help="Number of torchrun processes that share each sequence.")
]
ExistingScaling = Annotated[
    str | None,
    typer.Option(help="For a model with RoPE scaling: 'keep' or 'replace' it."),
]
OriginalLength = Annotated[
    int | None, typer.Option(help="Original context length in tokens, if the config is wrong.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that is shipped with the model.")
]
AttentionFactor = Annotated[
    float | None,
    typer.Option(help="One attention factor for every method (not for rescale files)."),
]
TokensPerDocument = Annotated[
    int | None, typer.Option(help="Tokens to score per document. Default: all.")
]


def existing_choice(choice: str | None) -> Any:
    """Check the value of --existing-scaling.

    Raises:
        ValueError: anything else.
    """
    if choice not in (None, "keep", "replace"):
        raise ValueError(f"--existing-scaling {choice}: choose keep or replace")
    return choice
