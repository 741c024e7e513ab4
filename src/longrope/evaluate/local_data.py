"""Read lm-eval's datasets from local copies instead of the hub.

Each dataset is a directory, ``owner/name`` or ``name`` as on the hub, with one directory per
configuration. In that, each split is a directory (as ``datasets`` saves it) or files named after
the split (Parquet, JSONL or Arrow, as on the hub).

``datasets.load_dataset`` is replaced while a task loads. Passing ``data_files`` to the tasks would
not do: the Python code of some tasks calls ``load_dataset`` itself, and missing splits are derived
from others.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Other hub names of the same dataset, used by some versions of lm-eval.
_ALSO = {"cais/mmlu": ("hails/mmlu_no_train",)}
_SPLITS = ("train", "validation", "test", "dev")
_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".arrow": "arrow"}
# Questions of a dataset with one split that become few-shot examples, at most.
_EXAMPLES = 64


@contextlib.contextmanager
def local_datasets(directory: str | None) -> Iterator[None]:
    """Make ``datasets.load_dataset`` read local copies in a directory; None changes nothing."""
    if directory is None:
        yield
        return
    import datasets

    def load(path: str, name: str | None = None, **_: Any) -> Any:
        return read_dataset(Path(directory), path, name)

    before, datasets.load_dataset = datasets.load_dataset, load
    try:
        yield
    finally:
        datasets.load_dataset = before


def read_dataset(directory: Path, path: str, name: str | None) -> Any:
    """Read all splits of a dataset from its local copy, and derive missing ones.

    A missing test or validation split is a copy of the other. Missing few-shot examples are taken
    from the end of the validation split, or of the test split without one, and removed there.

    Args:
        directory: directory of the local copies.
        path: name of the dataset on the hub.
        name: its configuration, or None.

    Raises:
        FileNotFoundError: no such dataset or configuration, or no split in it.
    """
    import datasets

    folder = _dataset_directory(directory, path, name)
    splits: dict[str, Any] = {}
    for split in _SPLITS:
        if (folder / split / "state.json").exists():
            splits[split] = datasets.load_from_disk(str(folder / split))
        elif files := _files(folder, split):
            kind = _FORMATS[files[0].suffix]
            names = [str(file) for file in files]
            # Read with the builder, as load_dataset is replaced at this moment.
            read = getattr(datasets.Dataset, f"from_{kind}", None)
            splits[split] = (
                read(names)
                if read
                else datasets.concatenate_datasets(
                    [datasets.Dataset.from_file(file) for file in names]
                )
            )
    if not splits:
        raise FileNotFoundError(f"{folder} contains none of the splits {', '.join(_SPLITS)}")
    whole: Any = _completed(splits)
    return datasets.DatasetDict(whole)


def _dataset_directory(directory: Path, path: str, name: str | None) -> Path:
    for known in (path, *_ALSO.get(path, ())):
        for folder in (directory / known, directory / known.rpartition("/")[2]):
            if folder.is_dir():
                found = [folder / n for n in ([name] if name else ["default", "none", "data"])]
                inside = next((c for c in found if c.is_dir()), folder)
                if (
                    name
                    and inside == folder
                    and any(c.is_dir() and c.name not in _SPLITS for c in folder.iterdir())
                ):
                    raise FileNotFoundError(f"{folder} has no directory {name}")
                return inside
    raise FileNotFoundError(f"{directory} has no directory {path}")


def _files(folder: Path, split: str) -> Sequence[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix in _FORMATS and file.name.startswith((f"{split}-", f"{split}."))
    )


def _completed(splits: dict[str, Any]) -> dict[str, Any]:
    own = next((name for name in ("validation", "test") if name in splits), None)
    if own is None:
        return splits
    if not splits.keys() & {"train", "dev"}:
        asked = splits[own]
        kept = len(asked) - min(_EXAMPLES, len(asked) // 4)
        splits["train"] = asked.select(range(kept, len(asked)))
        splits[own] = asked.select(range(kept))
    splits.setdefault("test", splits[own])
    splits.setdefault("validation", splits[own])
    return splits
