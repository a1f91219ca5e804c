"""What every section of the configuration is, and the types of values that several of them have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from distnorm.config.problems import IN_CODE, Document, check

# What fits in a signed 32-bit integer: far more than any run needs, and no surprise in any framework.
_LARGEST = 2**31 - 1

_INF: dict[str, Any] = {"const": "inf"}


def _infinity(value: object) -> object:
    return math.inf if isinstance(value, str) and value == "inf" else value


def _path_text(value: object) -> object:
    return fspath(value) if isinstance(value, PathLike) else value


def _sequence(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


PositiveInt = Annotated[int, Field(gt=0, le=_LARGEST)]
Count = Annotated[int, Field(ge=0, le=_LARGEST)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Location = Annotated[str, Field(min_length=1), BeforeValidator(_path_text)]
Order = Annotated[
    float,
    Field(gt=0),
    BeforeValidator(_infinity),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, _INF]}),
]
Threshold = Annotated[
    float | None,
    Field(ge=0),
    BeforeValidator(_infinity),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, _INF, {"type": "null"}]}),
]
# Tuples, so that a configuration is hashable; they are given and written as lists.
AS_TUPLE = BeforeValidator(_sequence)


@dataclass(frozen=True, slots=True)
class Conflict:
    """Values that are each right alone, and impossible together.

    Args:
        keys: the dotted paths of the values below the section that finds them, the likeliest culprit first.
        message: what was expected and what was found.
    """

    keys: tuple[str, ...]
    message: str


class Section(BaseModel):
    """A frozen mapping of known keys, none of which is converted from another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    if not TYPE_CHECKING:

        def __init__(self, /, **data: object) -> None:
            with suppress(ValidationError):
                super().__init__(**data)
                return
            check(type(self), Document(IN_CODE, data=data))

        # Tells pydantic that sections inside others need not be made through this constructor: their errors
        # then belong to the whole, with their paths.
        __init__.__pydantic_base_init__ = True

    def conflicts(self) -> Iterator[Conflict]:
        """Every combination of this section's values that can't be meant."""
        yield from ()

    def all_conflicts(self) -> Iterator[Conflict]:
        """The conflicts of the sections within this one, and its own."""
        for name in type(self).model_fields:
            if isinstance(inner := getattr(self, name), Section):
                for conflict in inner.all_conflicts():
                    yield Conflict(tuple(f"{name}.{key}" for key in conflict.keys), conflict.message)
        yield from self.conflicts()

    @model_validator(mode="after")
    def _possible(self, info: ValidationInfo) -> Section:
        # `check` names the outermost section, which alone searches, so all conflicts are found at once.
        if isinstance(info.context, type) and info.context is not type(self):
            return self
        if found := tuple(self.all_conflicts()):
            text = "; ".join(conflict.message for conflict in found)
            raise PydanticCustomError("conflict", "{text}", {"text": text, "conflicts": found})
        return self

    def model_dump(self, **options: Any) -> dict[str, Any]:
        """The keys as they are written in a file, with lists for sequences."""
        data = super().model_dump(**{"by_alias": True, **options})
        return {key: _plain(value) for key, value in data.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
