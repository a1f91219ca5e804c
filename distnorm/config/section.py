"""What all sections of the configuration have in common."""

from __future__ import annotations

import math
from contextlib import suppress
from os import PathLike, fspath
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from distnorm.config.report import IN_CODE, Document, check

# What fits in a signed 32-bit integer: far more than any run needs, and no surprise in any framework.
_LARGEST = 2**31 - 1

_INF: dict[str, Any] = {"const": "inf"}


def _infinity(value: object) -> object:
    return math.inf if isinstance(value, str) and value == "inf" else value


def _path_text(value: object) -> object:
    return fspath(value) if isinstance(value, PathLike) else value


PositiveInt = Annotated[int, Field(gt=0, le=_LARGEST)]
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
