"""The weight files of a model's directory: which they are, and what is in them."""

import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from longrope.errors import first_line, shortened
from longrope.files.parse import read_json
from longrope.models.meta import build_meta_model
from longrope.progress import quiet

_HEAD, _EMBEDDINGS = "lm_head.weight", "embed_tokens.weight"
_HEADS = ("lm_head", "embed_out", "output")  # of other architectures too
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Modules named mtp… (Qwen3-Next), or layers after the last one (DeepSeek-V3).
_PREDICTION = re.compile(r"(?:model\.|language_model\.)*(?:mtp\w*\.|layers\.(\d+)\.)")
_FIRST, _FURTHER = "model-main.safetensors", "model-prediction.safetensors"


def weight_files(directory: Path) -> list[Path]:
    """List the safetensors files that transformers loads from a model's source directory.

    Raises:
        ValueError: there are none, or the index names a file that is missing, lies outside the
            directory, or is no safetensors file. Or the user may not read one.
    """
    files = _named_files(directory)
    for file in files:  # safetensors would call it missing
        if not os.access(file, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            raise ValueError(f"{file}: permission denied; change who may read it")
    return files


def _named_files(directory: Path) -> list[Path]:
    if (directory / SINGLE).exists():
        return [file_inside(directory, SINGLE)]
    if not (directory / INDEX).exists():
        if any(directory.glob("*.bin")):
            raise ValueError(
                f"{directory}: its weights are pickled (.bin), which may run any code and is not "
                "read; load it in transformers and save it again, which writes safetensors"
            )
        for name in (SINGLE, INDEX):
            if (directory / name).is_symlink():
                raise ValueError(
                    f"{directory / name}: is a link to {os.readlink(directory / name)}, which is "
                    "missing; download the model again"
                )
        if any(directory.glob("model-*-of-*.safetensors")):
            raise ValueError(
                f"{directory}: has parts of the weights, but no {INDEX}; download that file too"
            )
        raise ValueError(f"{directory}: has no {SINGLE}; save the model in that form")
    index = file_inside(directory, INDEX)
    files = []
    for name in _names_in_index(index):
        file = file_inside(directory, name)
        if file.suffix != ".safetensors":
            raise ValueError(
                f"{index}: names {name!r}, but only safetensors are read; load the model in "
                "transformers and save it again, which writes safetensors"
            )
        if not file.is_file():  # nor a link to one
            raise ValueError(f"{file}: is missing, though {index.name} names it")
        files.append(file)
    return files


def _names_in_index(index: Path) -> list[str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(
            f"{index}: names no weight files (its weight_map is {shortened(found)}); save the "
            "model again, which writes it anew"
        )
    return sorted({str(name) for name in found.values()})


def file_inside(directory: Path, name: str) -> Path:
    """Return the file of a model's directory with a name that one of its files gives.

    In the hub's cache, a snapshot's files are links to the blobs of the same model.

    Raises:
        ValueError: it leads outside the directory, by its name or by symbolic links.
    """
    root = directory.resolve()
    places = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    file = directory / name
    leads_out = "\0" in name or ".." in Path(name).parts
    if leads_out or not any(file.resolve().is_relative_to(place) for place in places):
        raise ValueError(
            f"{directory}: {name!r} leads outside the model's directory; if it belongs to the "
            "model, put the file itself there"
        )
    return file


def stored_tensors(directory: Path) -> Iterator[tuple[str, Any]]:
    """Yield the name and the safetensors slice of every weight; only headers are read.

    Raises:
        ValueError: no weight files, or one is not safetensors.
    """
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 (a safetensors file is no dict)
                    yield name, weights.get_slice(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file}: is not a whole safetensors file ({first_line(error)}); get it again"
            ) from None


def prediction_tensors(directory: Path, config: Any) -> list[str]:
    """Name a checkpoint's tensors for multi-token prediction, which transformers does not load.

    Args:
        config: transformers' config of the text model.

    Raises:
        ValueError: no weight files, or one is not safetensors.
    """
    layers, more = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", 0) or 0
    found = []
    for name, _ in stored_tensors(directory):
        match = _PREDICTION.match(name)
        if match and (match[1] is None or layers <= int(match[1]) < layers + more):
            found.append(name)
    return found


def add_tensors(source: Path, names: Collection[str], directory: Path) -> None:
    """Copy tensors that a checkpoint lacks from another, to a further file that its index names."""
    lacking = set(names) - {name for name, _ in stored_tensors(directory)}
    if not lacking:
        return
    tensors = {name: part[:] for name, part in stored_tensors(source) if name in lacking}
    save_file(tensors, directory / _FURTHER, metadata={"format": "pt"})
    if (single := directory / SINGLE).exists():  # transformers would read this one alone
        named = dict.fromkeys((name for name, _ in stored_tensors(directory)), _FIRST)
        single.rename(directory / _FIRST)
    else:
        named = read_json(directory / INDEX)["weight_map"]
    index = {"metadata": {}, "weight_map": named | dict.fromkeys(tensors, _FURTHER)}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def check_weights(directory: Path, config: Any, trust_remote_code: bool) -> None:
    """Check by their names and shapes that a directory has all weights of its model.

    The weights of a quantised model are known only to the library that quantised it.

    Args:
        config: transformers' config of the model.

    Raises:
        ValueError: no weight files, one that is not safetensors, or missing tensors.
    """
    state = {
        name: torch.empty(part.get_shape(), device="meta")
        for name, part in stored_tensors(directory)
    }
    if getattr(config, "quantization_config", None) is not None:
        return
    model: Any = build_meta_model(str(directory), config, trust_remote_code)[0]
    try:
        with quiet():
            _, report = type(model).from_pretrained(
                None, config=config, state_dict=state, device_map="meta", output_loading_info=True
            )
    except Exception as error:  # tensors that do not fit each other
        raise ValueError(f"{directory}: its weights are not whole: {first_line(error)}") from error
    require_tensors(str(directory), report)


def require_tensors(source: str, report: Any) -> None:
    """Check, in what transformers reports of loading, that no tensor of a model is missing.

    Raises:
        ValueError: a tensor is missing. The message names it, or the prefix that all names in the
            file have.
    """
    missing, others = (sorted(report[f"{kind}_keys"]) for kind in ("missing", "unexpected"))
    if not missing:
        return
    ends = (name.removesuffix(part) for name in others for part in missing if name.endswith(part))
    before = next((start for start in ends if start.endswith(".")), None)
    if before:
        raise ValueError(
            f"{source}: its tensors are named {before}… (as those of a compiled or wrapped model); "
            f"take {before!r} off the names and save the file again"
        )
    if len(missing) == 1 and missing[0].removesuffix(".weight").rpartition(".")[2] in _HEADS:
        raise ValueError(
            f"{source}: it has no output head ({missing[0]}), as embedding and classification "
            "models do not; give a language model, or set tie_word_embeddings to true in its "
            "config.json if its embeddings are the head"
        )
    raise ValueError(
        f"{source}: {len(missing)} of the model's tensors are missing, such as {missing[0]}; "
        "give the whole of it (a GGUF file in parts: llama-gguf-split --merge joins them)"
    )


def has_own_head(directory: Path, names: Sequence[str] = (_HEAD, _EMBEDDINGS)) -> bool:
    """Return whether the weights hold an output head that differs from the embeddings.

    ``tie_word_embeddings`` in a config can be wrong. transformers then believes the weights, and
    other engines the config.

    Args:
        names: ends of the names of the two weights; see :func:`head_and_embeddings`.
    """
    found = {
        end: part
        for name, part in stored_tensors(directory)
        for end in names
        if f".{name}".endswith(f".{end}")
    }
    if len(found) < 2:
        return False
    head, embeddings = (part[:] for part in found.values())
    return not torch.equal(head, embeddings)


def head_and_embeddings(model: Any) -> list[str]:
    """Return the ends of the names of a model's output head and embeddings, as far as it has them.

    The beginnings differ between a checkpoint and the model that it is loaded into.
    """
    wanted = model.get_output_embeddings(), model.get_input_embeddings()
    named = {id(module): name for name, module in model.named_modules()}
    return [
        f"{named[id(module)].rpartition('.')[2]}.weight" for module in wanted if module is not None
    ]
