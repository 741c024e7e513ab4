"""The base of every configuration, and its errors in one line. Imports no torch."""

from collections.abc import Callable, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from longrope.errors import shortened

_LARGEST = 2**63 - 1  # torch and numpy hold no larger integer


def _takes_bool(annotation: Any) -> bool:
    return annotation is bool or any(map(_takes_bool, get_args(annotation)))


class Config(BaseModel):
    """Base class of every configuration: immutable, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    @field_validator("*", mode="before")
    @classmethod
    def _plain_values(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ValueError(f"{info.field_name} is {shortened(value)}, which is too large")
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and not _takes_bool(field.annotation):  # YAML's on and off
            raise PydanticCustomError("bool", "give another value, or leave it out")
        return value

    @classmethod
    def make(cls, options: Mapping[str, Any], name: Callable[[str], str] = str) -> Self:
        """Build any configuration from its options, and report an invalid one in one line.

        Args:
            name: how the caller writes an option's name, for error messages.

        Raises:
            ValueError: an unknown option or a value out of range, in one line.
        """
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            first = error.errors()[0]
            if first["type"] == "value_error":
                raise ValueError(str(first.get("ctx", {})["error"])) from None
            key = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                known = ", ".join(map(name, cls.model_fields))
                raise ValueError(f"no key {name(key)!r}; there are {known}") from None
            value = shortened(first["input"])
            raise ValueError(f"{name(key)} is {value}: {first['msg'].lower()}") from None
