"""Checked reads of JSON and YAML files: values of known types, errors that name file and field."""

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from longrope.errors import shortened

_LONGEST_INTEGER = 300  # digits: it still fits a float
# Raised by code that meets content of other types than it expects.
_WRONG_CONTENT = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
# How a Git LFS pointer begins.
_LFS = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(path: Path) -> None:
    """Refuse a Git LFS pointer, which stands in place of a file that was not downloaded.

    Raises:
        ValueError: ``path`` is such a pointer.
    """
    try:
        with path.open("rb") as file:
            found = file.read(len(_LFS))
    except OSError:  # whoever reads it says why
        return
    if found == _LFS:
        raise ValueError(f"{path} is a Git LFS pointer, not the file; run 'git lfs pull' there")


def read_json(path: Path, kind: Any = dict[str, Any]) -> Any:
    """Read a JSON file into a value of a known type.

    Args:
        kind: the type of the content, as pydantic checks it: a ``TypedDict``, ``list[str]``, …

    Raises:
        ValueError: no such file, not JSON, nested too deeply, an integer of hundreds of digits, or
            another type; it names the file, the field and its value.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_int=parse_integer)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except RecursionError:
        raise ValueError(f"{path}: is not valid JSON (nested too deeply)") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not JSON (not UTF-8 text)") from None
    except ValueError as error:
        raise ValueError(f"{path}: is not valid JSON ({error})") from None
    try:
        return _adapter(kind).validate_python(found)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "its content"
        raise ValueError(
            f"{path}: {field} is {shortened(first['input'])}: {first['msg'].lower()}"
        ) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        OSError: it cannot be read.
        ValueError: what :func:`parse_yaml` refuses, or no mapping; it names the file.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        why = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error
        raise ValueError(f"{path} is not valid YAML ({why})") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} is not a mapping of keys to values")
    return content


def parse_yaml(text: str) -> Any:
    """Parse YAML without tags that run code or duplicate keys, and with bounded aliases.

    Raises:
        ValueError: not such YAML.
    """
    try:
        return yaml.load(text, _YamlLoader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    # Its constructors raise other types for single values, such as KeyError for `!!bool maybe`.
    except (yaml.YAMLError, *_WRONG_CONTENT) as error:
        raise ValueError(" ".join(str(error).split())) from None


class _YamlLoader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys, as the YAML specification does.

    It refuses aliases that stand for more values than any file of ours has: nested ones, each of
    several copies of the one before, grow without bounds.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _expanded(node, {}) > _MOST_NODES:
            raise yaml.YAMLError(f"its aliases stand for more than {_MOST_NODES:,} values")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"{key.value!r} stands twice, again in line {line}")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# Values of a YAML file at most, each counted as often as aliases repeat it.
_MOST_NODES = 10_000


def _expanded(node: yaml.Node, known: dict[int, float]) -> float:
    """Count the values of a YAML node, aliases written out; infinite within themselves."""
    if id(node) not in known:
        known[id(node)] = math.inf
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [one for pair in node.value for one in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        known[id(node)] = 1 + sum(_expanded(one, known) for one in inner)
    return known[id(node)]


@contextlib.contextmanager
def content_of(path: Path, remedy: str) -> Iterator[None]:
    """Name a file whose content the code within cannot use: missing keys, or values of other types.

    Args:
        remedy: what to do about it, such as "run the comparison again".

    Raises:
        ValueError: the code within raised an error of that kind.
    """
    try:
        yield
    except RecursionError:
        raise ValueError(f"{path}: is nested too deeply; {remedy}") from None
    except _WRONG_CONTENT as error:
        known = (str(path), str(path.parent))
        if isinstance(error, ValueError) and str(error).startswith(known):
            raise
        what = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: is damaged ({shortened(what, 200)}); {remedy}") from None


def parse_integer(digits: str) -> int:
    """Parse an integer of JSON; raises ``ValueError`` if it is too long for a float."""
    if len(digits) > _LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


_adapter = functools.cache(TypeAdapter)
