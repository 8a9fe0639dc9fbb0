"""Base class of all config sections and table rows, and the names of types in help and error texts."""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """Base of all sections and rows: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_one(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and value_type(cls.model_fields[info.field_name or ""].annotation) is not bool:
            raise PydanticCustomError("bool", "is neither a number nor a string")
        return value


def value_type(annotation: Any) -> Any:
    """The type of a value that is given: `int` for `int | None`, where None is a value that is not given."""
    if get_origin(annotation) in (types.UnionType, Union):  # Literal[...] | None is a Union
        return next(kind for kind in get_args(annotation) if kind is not types.NoneType)
    return annotation


def type_name(annotation: Any) -> str:
    """Name of a field's type in help and error texts: `int`, or `a|b|c` for a choice."""
    annotation = value_type(annotation)
    if get_origin(annotation) is Literal:
        return "|".join(str(choice) or '""' for choice in get_args(annotation))
    if get_origin(annotation) is dict:
        return "weights"
    return {"bool": "true|false"}.get(annotation.__name__, annotation.__name__)


def row_class(annotation: Any) -> type[Section] | None:
    """Class of the rows of an array of tables; None for any other type of a field."""
    row = get_args(annotation)[0] if get_origin(annotation) is tuple else None
    return row if isinstance(row, type) and issubclass(row, Section) else None
