"""Command-line options that several verbs share, and options made from a configuration."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from longrope.execution import ExecutionConfig

Model = Annotated[
    str, typer.Argument(help="Directory, hub id, GGUF file, or 'bundled'.", metavar="MODEL")
]
DATA_HELP = (
    "Text, JSON, JSONL, CSV or Parquet file, directory of such files, hub dataset, or one of "
    "python-library and python-library-held-out (of this machine); repeatable."
)
Data = Annotated[list[str], typer.Option(help=DATA_HELP)]
Field = Annotated[str, typer.Option(help="Text field in JSON, JSONL, CSV, Parquet and datasets.")]
Pack = Annotated[
    bool, typer.Option("--pack", help="Join documents into windows, with BOS and EOS between them.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
ExistingScaling = Annotated[
    Literal["keep", "replace"] | None,
    typer.Option(help="For a model with RoPE scaling: keep it, or replace it."),
]
OriginalLength = Annotated[
    int | None, typer.Option(help="Original context length in tokens, if the config is wrong.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help=ExecutionConfig.model_fields["trust_remote_code"].description
    ),
]
AttentionFactor = Annotated[
    float | None,
    typer.Option(help="One attention factor for every method (not for rescale files)."),
]


def option_name(name: str) -> str:
    """Return the command-line option of a field: ``chunk_size`` is ``--chunk-size``."""
    return "--" + name.replace("_", "-")


def examples(*commands: str) -> str:
    """Return the examples at the end of a verb's help."""
    return "\n\n".join(["Examples:", *commands])


def add_options(
    parameter: str,
    models: Mapping[str, type[BaseModel]],
    *,
    leave_out: tuple[str, ...] = (),
    shared: str = "",
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb one command-line option for each field of some configurations.

    The options stand where ``parameter`` stands in the verb's signature, and the verb gets those
    that the user gave as a dictionary. Types, defaults and descriptions are the fields' own.

    Args:
        parameter: name of the verb's parameter.
        models: title of a group of options in the help → a configuration.
        leave_out: fields without an option.
        shared: title of the group of fields that several configurations have.
    """
    fields: dict[str, dict[str, FieldInfo]] = {}
    for title, model in models.items():
        for name, field in model.model_fields.items():
            if name not in leave_out:
                fields.setdefault(name, {})[title] = field

    def option(name: str) -> inspect.Parameter:
        titles = fields[name]
        panel = shared if len(titles) > 1 else next(iter(titles))
        kinds: list[Any] = [field.annotation for field in titles.values()]
        text = _help(name, titles)
        if kinds == [bool]:
            kind, default = (
                Annotated[bool, typer.Option(option_name(name), help=text, rich_help_panel=panel)],
                False,
            )
        else:
            if get_origin(kinds[0]) is Literal:  # typer shows one Literal's values as choices
                kinds = [Literal[tuple(value for kind in kinds for value in get_args(kind))]]
            joined = functools.reduce(lambda a, b: a | b, kinds) | None
            kind = Annotated[joined, typer.Option(help=text, rich_help_panel=panel)]
            default = None
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
        )

    flags = {
        name
        for name, titles in fields.items()
        if all(field.annotation is bool for field in titles.values())
    }

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(verb)
        parameters = []
        for name, own in signature.parameters.items():
            made = [option(field) for field in fields] if name == parameter else [own]
            parameters += [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in made]

        @functools.wraps(verb)
        def called(**arguments: Any) -> None:
            values = {name: arguments.pop(name) for name in fields}
            given = {
                name: value
                for name, value in values.items()
                if value is not None and not (value is False and name in flags)
            }
            verb(**arguments, **{parameter: given})

        called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {one.name: one.annotation for one in parameters}
        return called

    return decorate


def _help(name: str, titles: Mapping[str, FieldInfo]) -> str:
    """Return the help of an option: its field's description and default."""
    text = (next(iter(titles.values())).description or name).removesuffix(".")
    defaults = {
        title: field.default for title, field in titles.items() if field.default is not None
    }
    different = name != "algorithm" and len({str(field.default) for field in titles.values()}) > 1
    for title, default in list(defaults.items())[:1]:
        if default is not False:
            text += f"; default {default}" + (f" for {title.lower()}" if different else "")
    return text + "."
