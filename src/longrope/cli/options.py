"""The options that several verbs of the command line share."""

from typing import Annotated, Any

import typer

Model = Annotated[
    str, typer.Argument(help="A directory, a hub id, a GGUF file, or 'bundled'.", metavar="[MODEL]")
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Text, folder, JSON, JSONL, Parquet or hub dataset id; repeatable. By default the "
        "Python library of this machine.",
    ),
]
Field = Annotated[str, typer.Option(help="The text's field in JSON, JSONL, Parquet and datasets.")]
Pack = Annotated[
    bool, typer.Option("--pack", help="Let windows join documents, with BOS and EOS between.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:1; by default a GPU if any.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16.")]
Chunk = Annotated[
    int | None,
    typer.Option(help="Tokens that go through a layer at a time; 2,048, on a GPU 8,192."),
]
OffloadActivations = Annotated[
    str | None, typer.Option(help="Where hidden states wait: cpu saves GPU memory, a folder both.")
]
Offload = Annotated[
    str | None,
    typer.Option(help="weights: leave them on the host, two layers at a time on the device."),
]
SequenceParallel = Annotated[
    int, typer.Option(help="Processes of torchrun that share every sequence.")
]
ExistingScaling = Annotated[
    str | None,
    typer.Option(help="For a model that is scaled already: keep its scaling, or replace it."),
]
OriginalLength = Annotated[
    int | None, typer.Option(help="Tokens the model handles, where its config is wrong.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]
AttentionFactor = Annotated[
    float | None, typer.Option(help="One attention factor for every row (not for rescale files).")
]
TokensPerDocument = Annotated[
    int | None, typer.Option(help="Score about so many tokens of each document; by default all.")
]


def existing_choice(choice: str | None) -> Any:
    """What --existing-scaling may be.

    Raises:
        ValueError: anything else.
    """
    if choice not in (None, "keep", "replace"):
        raise ValueError(f"--existing-scaling {choice}: choose keep or replace")
    return choice
