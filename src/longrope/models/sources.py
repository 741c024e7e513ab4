"""Read models from a directory, the hub, a GGUF file or the package."""

import contextlib
import importlib.util
import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from longrope.errors import first_line, shortened
from longrope.files.parse import read_json, refuse_lfs_pointer
from longrope.models.bundled import BUNDLED
from longrope.models.config_check import check_config
from longrope.models.gguf_file import open_gguf, scaling_of
from longrope.models.weights import require_tensors, weight_files
from longrope.progress import discard_stderr

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def read_pretrained(auto: Any, source: str, trust_remote_code: bool, **options: Any) -> Any:
    """Call ``auto.from_pretrained`` for any source: a directory, hub id, GGUF file or bundled.

    Raises:
        ValueError: no such model, or it cannot be read; one line. A model with missing tensors
            is refused too: transformers would initialise them at random.
    """
    path, reads_weights = _local_path(source), auto not in (AutoConfig, AutoTokenizer)
    options["trust_remote_code"] = trust_remote_code
    if path.is_file() and path.suffix == ".gguf":
        options["gguf_file"] = path.name
        if reads_weights:
            from transformers import GgufConfig

            options.pop("use_safetensors")
            options["quantization_config"] = GgufConfig(dequantize=True)
        location = str(path.parent)
    elif path.is_dir():
        _check_is_checkpoint(path, reads_weights)
        location = str(path)
    elif path.exists() or path.suffix == ".gguf" or not _HUB_ID.fullmatch(source):
        raise ValueError(
            f"{source}: no such model; give a directory with config.json, a .gguf file, a hub id "
            "(owner/name), or 'bundled'"
        )
    else:
        location = source
    if auto is AutoConfig:
        _check_config(source, path)
    try:
        if not reads_weights:
            return auto.from_pretrained(location, **options)
        # transformers' bar for converting GGUF tensors has no switch.
        with discard_stderr() if "gguf_file" in options else contextlib.nullcontext():
            loaded: Any = auto.from_pretrained(location, output_loading_info=True, **options)
        model, report = loaded
    except ImportError as error:
        raise ValueError(f"{source}: reading it needs more: {first_line(error)}") from None
    except Exception as error:
        if "gated repo" in str(error).lower() or "401 client" in str(error).lower():
            raise ValueError(
                f"{source}: the hub wants a login for it: run 'hf auth login', and accept the "
                "model's terms on its page"
            ) from None
        if "custom code" in str(error) and not trust_remote_code:
            raise ValueError(
                f"{source}: it comes with code of its own, which is not run by default; read the "
                "code, and give trust_remote_code=True if you trust it"
            ) from None
        if auto is AutoTokenizer and _needs_sentencepiece(path):
            raise ValueError(
                f"{path / 'tokenizer.model'}: reading it requires sentencepiece: pip install "
                "sentencepiece protobuf (or give a checkpoint with tokenizer.json)"
            ) from None
        missing = isinstance(error, OSError) and not path.exists()
        what = "no such directory, nor read from the hub" if missing else "cannot be loaded"
        raise ValueError(f"{source}: {what}: {first_line(error)}") from error
    require_tensors(source, report)
    if getattr(model, "_hf_peft_config_loaded", False):  # of the hub
        raise ValueError(
            f"{source}: comes with an adapter (PEFT) beside whole weights; save what "
            "merge_and_unload() makes of the two, and give that"
        )
    return model


def _needs_sentencepiece(path: Path) -> bool:
    only_model = (path / "tokenizer.model").exists() and not (path / "tokenizer.json").exists()
    packages = ("sentencepiece", "google.protobuf")
    return only_model and not all(map(_is_installed, packages))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _check_config(source: str, path: Path) -> None:
    """Refuse a config that transformers would take for ever or silently wrongly."""
    if path.is_dir():
        if (path / "config.json").exists():
            check_config(read_json(path / "config.json"), str(path / "config.json"))
        return
    if path.is_file():
        open_gguf(path)
        return
    try:
        found, _ = PreTrainedConfig.get_config_dict(source)
    except Exception:  # transformers says why when the config is read
        return
    check_config(found, f"{source}: config.json")


def _check_is_checkpoint(path: Path, reads_weights: bool) -> None:
    """Refuse a model source that is no safetensors checkpoint; the error says what it is."""
    for file in path.iterdir():
        if file.is_file():
            refuse_lfs_pointer(file)
    if not (path / "config.json").exists():
        if (path / "adapter_config.json").exists():
            raise ValueError(
                f"{path}: is an adapter of another model (PEFT); give what its merge_and_unload() "
                "makes of the two, saved"
            )
        if (path / "recipe.yaml").exists() and (path / "model").is_dir():
            raise ValueError(f"{path}: is a run; its checkpoint is {path / 'model'}")
    elif (path / "adapter_config.json").exists():
        raise ValueError(
            f"{path}: has an adapter (adapter_config.json) beside whole weights, which "
            "transformers would add to them; remove its files if they are merged, or give what "
            "merge_and_unload() makes of the two, saved"
        )
    if reads_weights:
        weight_files(path)


def is_in_config_file(source: str, config: Any, key: str) -> bool:
    """Return whether a model source's config file sets a key; else transformers' default holds."""
    path = _local_path(source)
    if path.is_file():  # GGUF
        return True
    from transformers import PreTrainedConfig

    try:
        found, _ = PreTrainedConfig.get_config_dict(str(path) if path.is_dir() else source)
    except OSError:  # the hub is unreachable now; the config was read before
        return True
    text = found | (found.get("text_config") or {})
    return key in text or config.attribute_map.get(key) in text


def _local_path(source: str) -> Path:
    path = BUNDLED if source == "bundled" else Path(source)
    try:
        path.exists()
    except OSError as error:  # such as a name that is too long
        raise ValueError(f"{shortened(source)}: no such model ({error.strerror})") from None
    return path


def local_copy(source: str) -> Path:
    """Return the directory or GGUF file of a model source; a hub id is downloaded first.

    Raises:
        ValueError: no such model.
    """
    path = _local_path(source)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    try:
        kinds = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"]
        copies = ["consolidated*", "original/*"]  # of the same weights, for other programs
        return Path(snapshot_download(source, allow_patterns=kinds, ignore_patterns=copies))
    except Exception as error:
        raise ValueError(
            f"{source}: no such directory, nor read from the hub: {first_line(error)}"
        ) from error


def loaded_from(source: str) -> Path | None:
    """Return the directory that a loaded model came from, for the hub's that in its cache.

    None for a GGUF file.
    """
    path = _local_path(source)
    if not path.exists():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(source, "config.json")
        path = Path(found).parent if isinstance(found, str) else path
    return path if path.is_dir() else None


def refuse_scaled_gguf(source: str) -> None:
    """Refuse a GGUF source with RoPE scaling, which transformers drops silently on reading.

    Raises:
        ValueError: the file is scaled, or is no GGUF file.
    """
    path = _local_path(source)
    if not (path.is_file() and path.suffix == ".gguf"):
        return
    if (found := scaling_of(open_gguf(path))) is not None:
        raise ValueError(
            f"{path}: its RoPE is scaled already ({found}), which transformers drops when it "
            "reads GGUF; give the Hugging Face checkpoint, or start over with "
            "rope_scaling='replace' and `original_length`"
        )
