"""What a monitor takes in about layers, and the alerts that it gives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

METRICS_FILE, LAYERS_FILE, ALERTS_FILE = "metrics.jsonl", "layers.jsonl", "alerts.jsonl"
STARTS_FILE, NOTES_FILE = "starts.jsonl", "notes.md"

Kind = Literal["vanishing", "exploding", "clip_rate", "non_finite", "divergence"]


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer's gradient in one monitored step, before clipping.

    Args:
        layer: its name.
        norm: the 2-norm over all its elements.
        rms: the norm divided by the root of the number of elements.
        max: the largest magnitude; None where it wasn't measured.
        zero_fraction: the share of elements that are exactly zero.
        grad_to_weight: the norm divided by that of the weights; None where it wasn't measured.
    """

    layer: str
    norm: float
    rms: float
    max: float | None
    zero_fraction: float
    grad_to_weight: float | None

    def numbers(self) -> dict[str, float]:
        """What was measured, by name."""
        fields = {name: getattr(self, name) for name in LAYER_NUMBERS}
        return {name: value for name, value in fields.items() if value is not None}


LAYER_NUMBERS = ("norm", "rms", "max", "zero_fraction", "grad_to_weight")


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that a rule found.

    Args:
        step: where.
        kind: the rule.
        layer: whose gradient; None where it is the whole model's.
        ranks: those that it concerns; None where that isn't known, or all are.
        value: what was found; None where it isn't a number.
        bound: what the value is beyond; None where there is none.
        message: the same in words.
    """

    step: int
    kind: Kind
    layer: str | None
    ranks: tuple[int, ...] | None
    value: float | None
    bound: float | None
    message: str

    def to_dict(self) -> dict[str, Any]:
        """The alert as a row of alerts.jsonl."""
        return asdict(self)


def scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, str | None, float]]:
    """The numbers of a step's row: each one's key, its clipping group if it is of one, and its value.

    Truth values are 0 and 1; when the row was written is no number of the step's. What isn't there, such as
    an unavailable noise scale, is left out.
    """
    for key, value in row.items():
        if key == "groups":
            for group, numbers in (value or {}).items():
                yield from ((name, group, number) for name, _, number in scalars(numbers))
        elif key not in ("step", "time") and isinstance(value, (bool, int, float)):
            yield key, None, float(value)


def as_python(value: Any) -> Any:
    """A number of torch or numpy as Python's, which every sink knows; anything else as it is."""
    if callable(item := getattr(value, "item", None)):
        with suppress(ValueError, RuntimeError):  # of more than one number
            return item()
    return value


def plain(value: Any) -> Any:
    """The value as JSON can hold it: a float that isn't finite as a string, which float() reads back.

    So is what JSON doesn't know: a fact that somebody hands in must not be the end of the file.
    """
    value = as_python(value)
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    is_known = value is None or isinstance(value, (str, int, float))
    return str(value) if not is_known or (isinstance(value, float) and not math.isfinite(value)) else value
