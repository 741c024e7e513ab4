"""MkDocs hook: generate the command-line and configuration pages from the code.

A page asks for its generated part with ``<!-- generated: NAME -->``.
"""

import inspect
import posixpath
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from longrope.cli import app
from longrope.cli.extend import ExtensionOptions
from longrope.pipeline.recipe import Recipe

_MARKER = re.compile(r"<!-- generated: (\w+) -->")
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)[^)]*\)")
# Options whose default is in their help; see longrope.cli.options.
_DEFAULT = re.compile(r"; default:? (.*)\.$")
# Sections of the recipe that name one of several configurations.
_SEARCHES = {"GradientSearchConfig": "gradient", "EvolutionSearchConfig": "evolution"}


def on_config(config: Any) -> Any:
    """Give headings the anchors that they have on a Git host, so that links work in both."""
    from pymdownx.slugs import slugify

    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Fill in the generated parts of a page, and unlink files outside the documentation."""
    generated = {"cli": cli_reference, "configuration": configuration_reference}
    markdown = _MARKER.sub(lambda found: generated[found[1]](), markdown)
    folder = posixpath.dirname(page.file.src_uri)

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[2]))
        return found[1] if target.startswith("../") else found[0]

    return _LINK.sub(link, markdown)


def cli_reference() -> str:
    """Return the Markdown of every verb: help, arguments, options and examples."""
    return "\n\n".join(
        part for name, verb in verbs() for part in (f"## longrope {name}", *_verb_parts(name, verb))
    )


def verbs() -> Iterator[tuple[str, Any]]:
    """Yield every verb of the program with its name, such as ``evaluate perplexity``."""
    group: Any = typer.main.get_command(app)
    for name in group.list_commands(None):
        verb = group.commands[name]
        inner = getattr(verb, "commands", None)
        if inner is None:
            yield name, verb
            continue
        for own, command in inner.items():
            yield f"{name} {own}", command


def _verb_parts(name: str, verb: Any) -> Iterator[str]:
    yield " ".join((verb.help or "").split())
    arguments = [p for p in verb.params if p.param_type_name == "argument"]
    usage = " ".join(_argument_name(argument) for argument in arguments)
    yield f"```text\nlongrope {name} {usage} [OPTIONS]\n```".replace("  ", " ")
    if arguments:
        yield _table(
            ("argument", "default", "description"),
            [(f"`{_argument_name(a)}`", _default(a)[0], a.help or "") for a in arguments],
        )
    panels: dict[str, list[tuple[str, ...]]] = {}
    for option in verb.params:
        if option.param_type_name == "option" and not option.hidden:
            default, text = _default(option)
            names = ", ".join(f"`{o}`" for o in (*option.opts, *option.secondary_opts))
            panel = getattr(option, "rich_help_panel", None) or "Options"
            panels.setdefault(panel, []).append((names, _option_type(option, verb), default, text))
    for title, rows in panels.items():
        yield f"**{title}**"
        yield _table(("option", "type", "default", "description"), rows)
    examples = [line for line in (verb.epilog or "").splitlines() if line.startswith("longrope ")]
    if examples:
        yield "**Examples**"
        yield "```bash\n" + "\n".join(examples) + "\n```"


def _argument_name(argument: Any) -> str:
    name = (argument.metavar or argument.name).strip("[]{}").upper()
    return name if argument.required else f"[{name}]"


def _option_type(option: Any, verb: Any) -> str:
    if option.is_flag and not option.secondary_opts:
        return "flag"
    kind = inspect.signature(verb.callback).parameters[option.name].annotation
    text = _type(kind).removesuffix(" or null").replace("Path", "path").replace("bool", "flag")
    if text.startswith("list of "):
        return f"{text.removeprefix('list of ')}, repeatable"
    return text


def _default(parameter: Any) -> tuple[str, str]:
    """Return the default and the description of a parameter of a verb."""
    text = " ".join((getattr(parameter, "help", None) or "").split())
    if found := _DEFAULT.search(text):
        return found[1], text[: found.start()] + "."
    if parameter.required:
        return "required", text
    value = parameter.default
    if (
        value is None
        or value is False
        or str(value) in ("", "()")
        or "UNSET" in repr(value).upper()
    ):
        return "", text
    return f"`{value}`", text


def configuration_reference() -> str:
    """Return the Markdown of every key of the recipe, section by section."""
    sections: dict[str, list[tuple[str, ...]]] = {}
    for key, kind, default, text in recipe_keys():
        section = key.rpartition(".")[0]
        sections.setdefault(section, []).append((f"`{key}`", kind, default, text))
    parts = []
    for section, rows in sections.items():
        parts.append(f"## `{section}`" if section else "## Top level")
        parts.append(_table(("key", "type", "default", "description"), rows))
    return "\n\n".join(parts)


def recipe_keys(
    model: type[BaseModel] = Recipe, prefix: str = ""
) -> Iterator[tuple[str, str, str, str]]:
    """Yield the dotted key, type, default and description of every setting of a recipe.

    Sections follow the keys beside them.
    """
    sections = []
    found: dict[str, list[tuple[str, FieldInfo, type[BaseModel]]]] = {}
    for name, field in model.model_fields.items():
        configurations = _configurations(field.annotation)
        if len(configurations) > 1:  # one of several; their keys stand beside the others
            for configuration in configurations:
                for inner, own in configuration.model_fields.items():
                    where = _SEARCHES.get(configuration.__name__, configuration.__name__)
                    found.setdefault(inner, []).append((where, own, configuration))
        elif configurations:
            sections.append((name, configurations[0]))
        else:
            found[name] = [("", field, model)]
    for name, variants in found.items():
        key = prefix + name
        _, field, owner = variants[0]
        text = _description(key, name, field, owner)
        if variants[0][0] and len(variants) < len(_SEARCHES):
            text += f" Only `{variants[0][0]}`."
        if name == "algorithm":
            yield key, "`gradient` `evolution`", _shown(field), text
            continue
        kinds = {where: _type(f.annotation, f.metadata) for where, f, _ in variants}
        defaults = {where: _shown(f) for where, f, _ in variants}
        yield key, _one_or_each(kinds), _one_or_each(defaults), text
    for name, section in sections:
        yield from recipe_keys(section, f"{prefix}{name}.")


def _one_or_each(values: dict[str, str]) -> str:
    """Return the value that all configurations share, or each with its configuration."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return ", ".join(f"{value} ({where})" for where, value in values.items())


def _configurations(annotation: Any) -> list[type[BaseModel]]:
    """Return the configurations that an annotation names; none for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return [found for part in get_args(annotation) for found in _configurations(part)]
    return []


def _type(annotation: Any, metadata: Any = ()) -> str:
    """Return a type as the tables show it, with its bounds."""
    origin, parts = get_origin(annotation), get_args(annotation)
    bounds = "".join(
        f" {sign} {getattr(bound, name):g}"
        for bound in metadata
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if getattr(bound, name, None) is not None
    )
    if origin is Annotated:
        inner = [m for part in parts[1:] for m in getattr(part, "metadata", [part])]
        return _type(parts[0], inner)
    if origin is Literal:
        return " ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        kinds = [_type(part, metadata) for part in parts if part is not type(None)]
        return " or ".join(kinds) + (" or null" if type(None) in parts else "")
    if origin in (tuple, list):
        return f"list of {_type(parts[0])}"
    return getattr(annotation, "__name__", str(annotation)) + bounds


def _shown(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    value = field.default
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _description(key: str, name: str, field: FieldInfo, owner: type[BaseModel]) -> str:
    """Return the description of a key: its field's, its docstring's or its option's."""
    text = field.description or _from_docstring(owner, name)
    if not text and "." not in key and (option := ExtensionOptions.model_fields.get(name)):
        text = option.description
    text = " ".join((text or "").replace("``", "`").split())
    return text if text.startswith("lm-eval") else text[:1].upper() + text[1:]


def _from_docstring(owner: type[BaseModel], name: str) -> str:
    """Return what the ``Args:`` of a class, or of its bases, say about a field."""
    for model in owner.__mro__:
        doc = inspect.cleandoc(model.__doc__ or "")
        arguments = doc.partition("\nArgs:\n")[2]
        found = re.search(rf"^    {name}: (.*(?:\n     +.*)*)", arguments, re.MULTILINE)
        if found:
            return found[1]
    return ""


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )
