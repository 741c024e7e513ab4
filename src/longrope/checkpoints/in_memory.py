"""Write a model in memory as a checkpoint, so that it can be exported."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longrope.files.atomic import apply_umask, scratch_directory
from longrope.labels import display_name
from longrope.models.info import without_adapters
from longrope.models.load import refuse_quantised


@contextlib.contextmanager
def saved_model(model: Any, tokenizer: Any, out: Path) -> Iterator[Path]:
    """Write a transformers model and its tokenizer to a directory beside ``out``, for a block.

    Raises:
        ValueError: no tokenizer, adapters that are not merged, or quantised weights.
    """
    base = without_adapters(model)
    if base is not model or getattr(base, "_hf_peft_config_loaded", False):
        raise ValueError(
            "model has adapters beside its weights: give model.merge_and_unload() to export it"
        )
    refuse_quantised(base)
    if tokenizer is None:
        raise ValueError("tokenizer is missing; give the tokenizer of the model in memory")
    name = display_name(base.config.name_or_path or type(base).__name__).replace("/", "--")
    dtype = base.config.dtype
    # Beside ``out`` also where that is a directory, which an export replaces.
    with scratch_directory(out.with_name(f"{out.name}.model")) as folder:
        directory = folder / name
        base.save_pretrained(directory)
        base.config.dtype = dtype  # save_pretrained leaves a string
        tokenizer.save_pretrained(directory)
        apply_umask(directory)  # an export may link to them
        yield directory
