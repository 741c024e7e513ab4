"""Local copies of the hub's data sets, where lm-eval would ask the hub.

A folder for each data set, ``owner/name`` or ``name`` as on the hub; in it one for each
configuration; in that a folder for each split (as ``datasets`` saves them) or files named
after their split (as the hub keeps them: Parquet, JSONL or Arrow).
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Names that lm-eval's data sets have, or had, elsewhere.
_ALSO = {"cais/mmlu": ("hails/mmlu_no_train",)}
_SPLITS = ("train", "validation", "test", "dev")
_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".arrow": "arrow"}
# Of a data set with one split, so many questions become examples for few-shot prompts.
_EXAMPLES = 64


@contextlib.contextmanager
def local_datasets(directory: str | None) -> Iterator[None]:
    """``datasets.load_dataset`` reads from a folder in place of the hub; None changes nothing."""
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
    """All splits of a data set.

    A split that is not there is taken from another: test and validation from each other.
    Examples for few-shot prompts are taken from the end of the one that has its answers (hidden
    tests have none), and not asked there.

    Raises:
        FileNotFoundError: nothing there has this name, or no split of it.
    """
    import datasets

    folder = _folder(directory, path, name)
    splits: dict[str, Any] = {}
    for split in _SPLITS:
        if (folder / split / "state.json").exists():
            splits[split] = datasets.load_from_disk(str(folder / split))
        elif files := _files(folder, split):
            kind = _FORMATS[files[0].suffix]
            names = [str(file) for file in files]
            # Straight from the builder: load_dataset is ours at this moment.
            read = getattr(datasets.Dataset, f"from_{kind}", None)
            splits[split] = (
                read(names)
                if read
                else datasets.concatenate_datasets(
                    [datasets.Dataset.from_file(file) for file in names]
                )
            )
    if not splits:
        raise FileNotFoundError(f"{folder} holds no split ({', '.join(_SPLITS)})")
    whole: Any = _completed(splits)
    return datasets.DatasetDict(whole)


def _folder(directory: Path, path: str, name: str | None) -> Path:
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
                    raise FileNotFoundError(f"{folder} has no folder {name}")
                return inside
    raise FileNotFoundError(f"{directory} has no folder {path}")


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
