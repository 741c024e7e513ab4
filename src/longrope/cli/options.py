"""Command-line options that several verbs share, and options made from a configuration."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

import pydantic
import typer
from pydantic.fields import FieldInfo

from longrope.base_config import Config
from longrope.execution import ExecutionConfig

Model = Annotated[
    str, typer.Argument(help="Directory, hub id, GGUF file, or 'bundled'.", metavar="MODEL")
]
DATA_HELP = (
    "Text, JSON, JSONL, CSV, TSV or Parquet file, directory of such files, hub dataset, or one of "
    "python-library and python-library-held-out (of this machine); repeatable."
)
Data = Annotated[list[str], typer.Option(help=DATA_HELP)]
FIELD_HELP = "Text field in JSON, JSONL, CSV, TSV, Parquet and datasets."
Field = Annotated[str, typer.Option(help=FIELD_HELP)]
Pack = Annotated[
    bool, typer.Option("--pack", help="Join documents into windows, with BOS and EOS between them.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help=ExecutionConfig.model_fields["trust_remote_code"].description
    ),
]
EXECUTION = {"Execution": ExecutionConfig}


class ScalingOptions(Config):
    """How to read a model whose config has RoPE scaling, or a wrong length."""

    rope_scaling: Literal["keep", "replace"] | None = pydantic.Field(
        default=None, description="For a model with RoPE scaling: keep it, or replace it."
    )
    original_length: int | None = pydantic.Field(
        default=None, description="Original context length in tokens, if the config is wrong."
    )


SCALING = {"": ScalingOptions}


def option_name(name: str) -> str:
    """Return the command-line option of a field: ``chunk_size`` is ``--chunk-size``."""
    return "--" + name.replace("_", "-")


def examples(*commands: str) -> str:
    """Return the examples at the end of a verb's help."""
    return "\n\n".join(["Examples:", *commands])


def add_options(
    parameter: str,
    models: Mapping[str, type[Config]],
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
        if get_origin(kinds[0]) is Literal:  # typer shows one Literal's values as choices
            kinds = [Literal[tuple(value for kind in kinds for value in get_args(kind))]]
        kind: Any = functools.reduce(lambda a, b: a | b, kinds)
        is_flag = kind is bool  # it has no form for False, so False is what was not given
        declared = typer.Option(
            *([option_name(name)] if is_flag else []), help=text, rich_help_panel=panel
        )
        return inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if is_flag else None,
            annotation=Annotated[kind if is_flag else kind | None, declared],
        )

    options = [option(name) for name in fields]

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(verb)
        parameters = []
        for name, own in signature.parameters.items():
            made = options if name == parameter else [own]
            parameters += [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in made]

        @functools.wraps(verb)
        def called(**arguments: Any) -> None:
            given = {
                option.name: value
                for option in options
                if (value := arguments.pop(option.name)) is not option.default
            }
            verb(**arguments, **{parameter: given})

        called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {one.name: one.annotation for one in parameters}
        return called

    return decorate


def _help(name: str, titles: Mapping[str, FieldInfo]) -> str:
    """Return the help of an option: its field's description and default."""
    text = (next(iter(titles.values())).description or name).removesuffix(".")
    defaults = [field.default for field in titles.values()]
    if name == "algorithm" or len(set(map(str, defaults))) == 1:
        shown = "" if defaults[0] in (None, False) else f"; default {defaults[0]}"
    else:
        title, default = next((t, f.default) for t, f in titles.items() if f.default is not None)
        shown = f"; default {default} for {title.lower()}"
    return f"{text}{shown}."
