"""What a monitor takes in about layers, and the alerts that it gives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

METRICS_FILE, LAYERS_FILE, ALERTS_FILE = "metrics.jsonl", "layers.jsonl", "alerts.jsonl"
STARTS_FILE, NOTES_FILE = "starts.jsonl", "notes.md"

Kind = Literal["vanishing", "exploding", "clip_rate", "non_finite", "divergence"]


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer's gradient in one monitored step, before clipping.

    The newest update is the weights less those before, as they were when the step before had been clipped.

    Args:
        layer: its name, or that of a slice.
        norm: the 2-norm over all its elements.
        rms: the norm divided by the root of the number of elements.
        max: the largest magnitude; None where it wasn't measured.
        zero_fraction: the share of elements that are exactly zero; None where it wasn't measured.
        grad_to_weight: the norm divided by that of the weights; None where it wasn't measured.
        weight_norm: the 2-norm of the weights; this and what follows: None where it wasn't measured.
        cos_weight: the cosine of gradient and weight.
        radial_share: its square, the share of the gradient's square that is along the weight.
        update_norm: the 2-norm of the newest update.
        update_to_weight: the same divided by that of the weights.
        cos_update: the cosine of gradient and newest update; below 0 while updates descend.
        spectral_norm: the largest of those of its weight matrices, estimated from below.
        stable_rank: the smallest of theirs: the square of (the norm of all elements / the spectral norm).
        of: the parameter of which this is a slice; None where it is none.
    """

    layer: str
    norm: float
    rms: float
    max: float | None
    zero_fraction: float | None
    grad_to_weight: float | None
    weight_norm: float | None = None
    cos_weight: float | None = None
    radial_share: float | None = None
    update_norm: float | None = None
    update_to_weight: float | None = None
    cos_update: float | None = None
    spectral_norm: float | None = None
    stable_rank: float | None = None
    of: str | None = None

    def numbers(self) -> dict[str, float]:
        """What was measured, by name."""
        named = {name: getattr(self, name) for name in _NUMBERS}
        return {name: value for name, value in named.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """The row as in layers.jsonl: the keys that every row has, and those that were measured."""
        always = {name: getattr(self, name) for name in ("layer", *LAYER_NUMBERS)}
        return {**always, **self.numbers()} | ({} if self.of is None else {"of": self.of})


LAYER_NUMBERS = ("norm", "rms", "max", "zero_fraction", "grad_to_weight")
"""What every row of a layer has."""
_NUMBERS = tuple(field.name for field in fields(LayerRow) if field.name not in ("layer", "of"))


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
