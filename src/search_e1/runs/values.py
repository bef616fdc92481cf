"""Refuses setting values that pydantic would silently convert to others."""

from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationInfo, field_validator


def _as_written(cls: Any, value: Any, info: ValidationInfo) -> Any:
    kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
    if isinstance(value, bool) and not kinds & {bool, Any}:
        raise ValueError("true or false, where something else is needed")
    if value == "" and Path in kinds:
        raise ValueError("an empty path, which would be the working directory; write . for that")
    return value


as_written = field_validator("*", mode="before")(_as_written)
"""Validator for a model's body: refuses a boolean for a number (1), and an empty string for a path (the working directory)."""


@cache
def _kinds(annotation: Any) -> frozenset[Any]:
    """The types that a value of this annotation can have, including list items."""
    inner = get_args(annotation)
    if not inner or get_origin(annotation) is Literal:
        return frozenset({annotation})
    return frozenset().union(*map(_kinds, inner))
