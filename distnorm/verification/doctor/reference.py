"""The other side: the same model in one process on the first rank, or a dump of another run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distnorm.plan.collectives import Ranks
from distnorm.verification.doctor.posting import Packed, deliver


@dataclass(frozen=True, slots=True)
class Known:
    """What every rank knows of one of the reference's parameters.

    Args:
        shape: its global shape.
        dtype: dtype of the weight.
        trains: whether it requires a gradient.
        place: its place in the order of the forward.
        tolerance: the relative difference that rounding alone explains.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    trains: bool
    place: int
    tolerance: float


@dataclass(slots=True)
class Expected:
    """One of the reference's parameters with its values.

    Args:
        weight: the whole weight.
        gradient: the whole gradient; `None` where there is none.
        parts: the summands of the gradient that parts of the batch give, where they are known.
    """

    weight: Tensor
    gradient: Tensor | None
    parts: list[Tensor] = field(default_factory=list)


class Reference(ABC):
    """One side of a comparison, whole parameters by name."""

    known: Mapping[str, Known]

    @property
    def names(self) -> Sequence[str]:
        """All parameters, in the order of the forward."""
        return sorted(self.known, key=lambda name: self.known[name].place)

    def bytes_of(self, name: str) -> int:
        """Bytes of a parameter, by a guess where it isn't known."""
        known = self.known.get(name)
        return 1 << 16 if known is None else int(torch.Size(known.shape).numel() * known.dtype.itemsize)

    @abstractmethod
    def fetch(self, ranks: Ranks, names: Sequence[str]) -> dict[str, Expected]:
        """The parameters that this rank asks for, those that the reference has. Collective."""


@dataclass(slots=True)
class Values:
    """What one process has of its whole model after a backward: weights and gradients by name."""

    weights: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    trains: dict[str, bool]


class Live(Reference):
    """The model in one process, on the first rank.

    Args:
        known: what all ranks know.
        values: on the first rank, the whole model's.
        parts: on the first rank, gradients of the parts of the batch, by part and name.
    """

    def __init__(
        self,
        known: Mapping[str, Known],
        values: Values | None,
        parts: Sequence[Mapping[str, Tensor | None]] = (),
    ) -> None:
        self.known, self._values, self._parts = known, values, parts

    def fetch(self, ranks: Ranks, names: Sequence[str]) -> dict[str, Expected]:
        to_first: list[Any] = [list(names), *[[] for _ in range(ranks.size - 1)]]
        answers: list[dict[str, Any]] = [{} for _ in range(ranks.size)]
        for rank, wanted in enumerate(deliver(ranks, to_first)):
            for name in wanted:
                if self._values is not None and name in self._values.weights:
                    gradient = self._values.gradients[name]
                    parts = [part.get(name) for part in self._parts]
                    answers[rank][name] = (
                        Packed.of(self._values.weights[name]),
                        None if gradient is None else Packed.of(gradient),
                        [Packed.of(part) for part in parts if part is not None],
                    )
        found: dict[str, Expected] = {}
        for name, (weight, gradient, parts) in deliver(ranks, answers)[0].items():
            found[name] = Expected(
                weight.tensor(), gradient and gradient.tensor(), [part.tensor() for part in parts]
            )
        return found
