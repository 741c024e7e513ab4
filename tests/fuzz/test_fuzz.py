"""Damaged and hostile files, by mutation: every one is read rightly, or refused in one line.

A case runs in a process forked from this one, with limits on its memory and time, so that a case
that fails says nothing about the next. ``--fuzz-seconds`` sets the time (60 by default).
"""

import contextlib
import copy
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from gguf_model import write_gguf
from longrope.checkpoints.importer import import_pair
from longrope.checkpoints.manifest import Manifest
from longrope.checkpoints.run_directory import original_of, short_attention_factor
from longrope.data.documents import Document, read_documents
from longrope.data.windows import tokenize
from longrope.distributed import Ranks
from longrope.evaluate.cache import require_same
from longrope.files.stores import JsonlStore
from longrope.models.bundled import BUNDLED
from longrope.models.info import inspect_model
from longrope.models.load import LoadedModel, load_model
from longrope.pipeline.recipe import load_recipe
from longrope.pipeline.run_state import recorded_choices
from longrope.report.figures import draw_figures
from longrope.report.page import write_page
from longrope.rope.rescale import Rescale
from longrope.search.run import SearchOptions, search_documents
from longrope.search.settings import EvolutionSearchConfig

pytestmark = pytest.mark.slow

_MEMORY, _SECONDS = 2 << 30, 10  # of the processor
_PATIENCE = 120  # seconds by the clock: other work may keep the processor busy
_DEEP = "[" * 100_000
# Values in place of others: of other types, at the ends of their range, and hostile ones.
_VALUES = [None, True, 0, -1, 1, 2**31, 2**63, 10**400, 1e308, -1e-320, float("nan")]
_VALUES += [
    "",
    "4",
    "../../etc/passwd",
    "\0",
    "é" * 300,
    "su",
    "yarn",
    [],
    [1],
    [[1]],
    {},
    {"": {}},
]
_VALUES += [{"": {}}, 10**9, 0.5, "[/x]", [None], {"rope_type": None}]


def mutated(draw, content):
    """A JSON value with some of its values replaced, removed, doubled or nested."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(content))
        if not places:
            return copy.deepcopy(draw(st.sampled_from(_VALUES)))
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        kind = draw(st.sampled_from(("replace", "replace", "remove", "wrap", "scale")))
        if kind == "replace":
            holder[key] = copy.deepcopy(draw(st.sampled_from(_VALUES)))
        elif kind == "remove":
            del holder[key]
        elif kind == "wrap":
            holder[key] = draw(st.sampled_from(([holder[key]], {"x": holder[key]})))
        elif isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            by = draw(st.sampled_from((-1, 0, 1e9, 10**9, 1e-9, 1e300)))
            with contextlib.suppress(OverflowError):
                holder[key] = holder[key] * by
    return content


def _places(content):
    """Every (container, key) of a JSON value; at most some of a long list."""
    if isinstance(content, dict):
        items = list(content.items())
    elif isinstance(content, list):
        items = list(enumerate(content))[:8]
    else:
        return
    for key, value in items:
        yield content, key
        yield from _places(value)


@st.composite
def files(draw, original: bytes):
    """Mutations of a file: of its JSON values where it is JSON, else and sometimes of its bytes."""
    with contextlib.suppress(ValueError):
        content = json.loads(original)
        if draw(st.integers(0, 3)):
            return json.dumps(mutated(draw, content)).encode()
    kind = draw(st.sampled_from(("cut", "flip", "insert", "deep", "empty", "grow")))
    if kind == "cut":
        return original[: draw(st.integers(0, max(0, min(len(original) - 1, 4000))))]
    if kind == "empty":
        return b""
    if kind == "deep":
        return (_DEEP if draw(st.booleans()) else '{"a":' * 50_000).encode()
    changed = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(changed) - 1, 3000))) if changed else 0
        if kind == "flip" and changed:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "grow" and len(changed) > 8:  # a count or length, as GGUF has them
            number = draw(st.sampled_from((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)))
            changed[at : at + 8] = struct.pack("<Q", number)
        else:
            changed[at:at] = draw(st.binary(min_size=1, max_size=8))
    return bytes(changed)


def in_child(work: Callable[[], object]) -> tuple[str, str]:
    """Run a reader in a forked child: ("right" | "refused" | "crash", what it said)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code, said = 1, ""
        torch.set_num_threads(1)  # makes the child's pool before its threads race to make it
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
            warnings.simplefilter("ignore")  # pytest raises them
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            work()
            outcome = "right", ""
        except ValueError as error:
            outcome = "refused", str(error)
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            outcome = "crash", f"{type(error).__name__} at {place}: {str(error)[:200]}"
        with contextlib.suppress(BaseException):
            os.write(writer, pickle.dumps(tuple(part[:3000] for part in outcome)))
            code = 0
        os._exit(code)
    os.close(writer)
    deadline = time.monotonic() + _PATIENCE
    with os.fdopen(reader, "rb") as pipe:
        os.set_blocking(pipe.fileno(), False)
        said = b""
        while time.monotonic() < deadline:
            part = pipe.read()
            if part == b"":
                break
            said += part or b""
            time.sleep(0.002)
        else:
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not said:
        return "crash", f"ended with status {status} (time, memory or a signal)"
    return pickle.loads(said)


# What is damaged, and what reads it: (kind, file to mutate, directory to read, reader).
_FACTORS = (1.0,) * 8


def _rescale() -> Rescale:
    return Rescale(_FACTORS, 1e4, 64, 512, 1.1)


def _check_rescale(found: Rescale) -> None:
    assert found.inv_freq.shape == (len(found.factors),)
    assert 0 < found.inv_freq.min() <= found.inv_freq.max() < float("inf")
    assert Rescale.from_json(found.to_json()) == found


def _run_directory(path: Path) -> None:
    path.mkdir()
    (path / "model").mkdir()
    for name in ("rescale.json", "short.json"):
        _rescale().save(path / name)
    recipe = {"model": "bundled", "rope_scaling": None, "original_length": 64, "target": "8x"}
    (path / "recipe.yaml").write_text(json.dumps(recipe))
    (path / "pair.json").write_text('{"short_attention_factor": 1.2}')
    choice = {"key": "search.budget", "value": 3, "reason": "x"}
    (path / "choices.json").write_text(json.dumps([choice]))
    (path / "cells.jsonl").write_text(json.dumps({"key": "a", "found": 1}) + "\n")
    (path / "evaluation.json").write_text(json.dumps({"of": {"model": "bundled"}}))
    row = {"method": "none", "length": 64, "perplexity": 3.0, "standard_error": 0.1}
    by_position = [{"method": "none", "length": 64, "buckets": [[0, 64, 3.0]]}]
    comparison = {"original_length": 64, "perplexity": [row], "by_position": by_position}
    (path / "compare.json").write_text(json.dumps(comparison))
    rows = [
        row | {"method": method, "length": length}
        for method in ("none", "yarn", "longrope")
        for length in (64, 512)
    ]
    results = {"schema": 1, "model": "m", "architecture": "L", "parameters": 9, "target": 512}
    results |= {"original_length": 64, "trained_length": None, "recovery_length": 128}
    results |= {"attention_factor": 1.1, "perplexity": rows, "passkey": [], "needle": []}
    results |= {"recovery": [{"length": 64, "original": 3.0, "without": 3.5, "with": 3.1}]}
    stage = {"name": "search", "seconds": 9.0, "forwards": 5, "tokens": 99}
    results |= {"stages": [stage], "effort": "quick", "versions": {"longrope": "0.1.0"}}
    (path / "results.json").write_text(json.dumps(results))


def _searched(loaded: LoadedModel, out: Path) -> Callable[[], None]:
    """Run a search of a moment in a directory, and return what runs it again: its result stands."""
    words = " ".join(f"word{i} of {i * i}" for i in range(400))
    documents = tokenize([Document("words", words)], loaded.tokenizer)
    config = EvolutionSearchConfig(windows=1, budget=2, population=2, parents=2, transfer="none")

    def search() -> None:
        options = SearchOptions("2x", out, seed=0, config=config)
        found = search_documents(loaded, documents, options, Ranks())
        assert found.best_loss < float("inf")
        _check_rescale(found.best)
        _check_rescale(Rescale.load(out / "rescale.json"))

    search()
    return search


def _cached(loaded: LoadedModel, root: Path) -> tuple[Path, Callable[[], None]]:
    """Tokenize a document into a cache, and return its file and what reads it."""

    def ids() -> list[int]:
        (found,) = tokenize([Document("text", "some words of a text")], loaded.tokenizer)
        return found.ids.tolist()

    os.environ["LONGROPE_CACHE"] = str(root / "cache")  # conftest.py restores it
    expected = ids()
    (file,) = (root / "cache").rglob("*.safetensors")

    def read() -> None:
        assert ids() == expected

    return file, read


def _documents(path: Path) -> None:
    for _ in read_documents([str(path)], "text"):
        pass


def targets(root: Path, model, saved: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    run, checkpoint, gguf = root / "run", root / "checkpoint", root / "model.gguf"
    _run_directory(run)
    shutil.copytree(BUNDLED, checkpoint, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    config = json.loads((checkpoint / "config.json").read_text())
    scaled = {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
    config["rope_parameters"] |= scaled | {"original_max_position_embeddings": 64}
    (checkpoint / "config.json").write_text(json.dumps(config))
    index = checkpoint / "model.safetensors.index.json"
    weights = {"a": "one.safetensors", "b": "two.safetensors"}
    sharded = root / "sharded"
    shutil.copytree(checkpoint, sharded)
    (sharded / "model.safetensors").rename(sharded / "one.safetensors")
    shutil.copy(sharded / "one.safetensors", sharded / "two.safetensors")
    (sharded / index.name).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    manifest = {"schema": 1, "format": "hf", "source": "x", "folded": None}
    manifest |= {"short": _rescale().to_json(), "long": _rescale().to_json()}
    (checkpoint / "longrope.json").write_text(json.dumps(manifest))
    write_gguf(model, gguf)
    (root / "recipe.yaml").write_text(
        json.dumps({"target": "8x", "seed": 1, "search": {"windows": 2}, "finetune": {"steps": 3}})
    )
    for name, text in (("rows.jsonl", '{"text": "a b c"}\n' * 3), ("rows.csv", "text\na\nb\n")):
        (root / name).write_text(text)

    loaded = load_model(str(saved))
    search, cached = _searched(loaded, root / "search"), _cached(loaded, root)

    def rescale():
        _check_rescale(Rescale.load(run / "rescale.json"))

    def settings_of():
        recipe = load_recipe(root / "recipe.yaml")
        assert load_recipe(root / "recipe.yaml", seed=0).target == recipe.target

    def read_config():
        inspect_model(str(checkpoint))
        for found in (import_pair(str(checkpoint)),):
            _check_rescale(found.short)
            _check_rescale(found.long)

    def read_sharded():
        load_model(str(sharded), rope_scaling="replace")

    return {
        "rescale": (run / "rescale.json", rescale),
        "recipe": (root / "recipe.yaml", settings_of),
        "config": (checkpoint / "config.json", read_config),
        "manifest": (checkpoint / "longrope.json", lambda: Manifest.load(checkpoint)),
        "index": (sharded / index.name, read_sharded),
        "safetensors": (sharded / "one.safetensors", read_sharded),
        "gguf": (gguf, lambda: (inspect_model(str(gguf)), import_pair_or_none(gguf))),
        "run recipe": (run / "recipe.yaml", lambda: original_of(str(run))),
        "pair": (run / "pair.json", lambda: short_attention_factor(run)),
        "choices": (run / "choices.json", lambda: recorded_choices(run)),
        "cells": (run / "cells.jsonl", lambda: JsonlStore(run / "cells.jsonl")),
        "evaluation": (
            run / "evaluation.json",
            lambda: require_same(run / "evaluation.json", {"model": "bundled"}),
        ),
        "comparison": (run / "compare.json", lambda: draw_figures(run)),
        "results": (run / "results.json", lambda: write_page(run)),
        "history": (root / "search" / "history.jsonl", search),
        "state": (root / "search" / "state.json", search),
        "tokens": cached,
        "rows": (root / "rows.jsonl", lambda: _documents(root / "rows.jsonl")),
        "table": (root / "rows.csv", lambda: _documents(root / "rows.csv")),
    }


def import_pair_or_none(path: Path) -> None:
    try:
        import_pair(str(path))
    except ValueError as error:
        if "not scaled" not in str(error):
            raise


def judged(file: Path, read: Callable[[], object]) -> tuple[str, str]:
    """Read a damaged file: what came of it, where a refusal has to name the file in one line."""
    outcome, said = in_child(read)
    named = str(file) in said or str(file.parent) in said
    if outcome == "refused" and (not named or "\n" in said.strip()):
        return "unnamed", said[:300]
    return outcome, said


def fuzzed(number: int, file: Path, end: float) -> Iterator[bytes]:
    """Mutations of a file for one round of the fuzz test, until its time has passed."""
    made: list[bytes] = []

    @seed(number)
    @settings(max_examples=10, database=None, suppress_health_check=list(HealthCheck))
    @given(files(file.read_bytes()))
    def make(content):
        made.append(content)

    make()
    return itertools.takewhile(lambda _: time.monotonic() < end, made)


def test_no_file_ends_in_a_traceback(micro_models, checkpoints, tmp_path, pytestconfig):
    table = targets(tmp_path, micro_models("llama"), checkpoints("llama"))
    for kind, (_, read) in table.items():
        assert in_child(read) == ("right", ""), kind
    end = time.monotonic() + pytestconfig.getoption("--fuzz-seconds")
    first = 0 if "CI" in os.environ else random.SystemRandom().randrange(10**6)
    faults: dict[str, tuple[str, bytes]] = {}
    counts: Counter[str] = Counter()
    for number in itertools.takewhile(lambda _: time.monotonic() < end, itertools.count(first)):
        for kind, (file, read) in table.items():
            original = file.read_bytes()
            for content in fuzzed(number, file, end):
                file.write_bytes(content)
                outcome, said = judged(file, read)
                counts[f"{kind}: {outcome}"] += 1
                if outcome in ("crash", "unnamed"):
                    faults.setdefault(f"{kind}: {outcome}: {said[:60]}", (said, content[:400]))
            file.write_bytes(original)
    print(f"{counts.total()} cases: {dict(sorted(counts.items()))}", file=sys.stderr)
    for key, (said, content) in faults.items():
        print(f"FAULT {key}\n  {said}\n  {content!r}", file=sys.stderr)
    assert not faults, sorted(faults)
