"""What a policy decides by, and what every policy can do."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from distnorm import kernels
from distnorm.errors import DistnormError
from distnorm.policies.decision import Decision

Reads = Literal["nothing", "total", "parameters", "units"]


@dataclass(frozen=True, slots=True)
class StepStatistics:
    """What a policy decides by, the same on every rank. Tensors are fp64, on the gradients' device.

    Args:
        total_norm: 0-d; may be inf or NaN, and is NaN where nothing was measured.
        history_norm: 0-d; the total norm rounded to fp32. Histories are fed with it, and thresholds come from
            it and from the state alone: topologies whose total norms differ in the last bits then have the
            same thresholds, bit for bit.
        loss: 0-d, or None where no rank gave one.
        parameter_norms: [n]; of every parameter of the whole model, rounded to fp32; 0 where a parameter has
            no gradient.
        numels: [n]; elements of every parameter of the whole model.
        unit_norms, unit_weight_norms: [u]; of the gradient and of the weights of every output unit.
    """

    total_norm: Tensor
    history_norm: Tensor
    loss: Tensor | None = None
    parameter_norms: Tensor | None = None
    numels: Tensor | None = None
    unit_norms: Tensor | None = None
    unit_weight_norms: Tensor | None = None

    @classmethod
    def of(cls, total_norm: Tensor, **more: Tensor | None) -> StepStatistics:
        """The statistics of a step with this total norm."""
        return cls(total_norm, rounded(total_norm), **more)


class Policy(ABC):
    """From the statistics of a step to what is done with its gradients.

    A policy decides alike on every rank, without a collective and without a read on the host: its state is
    tensors on the gradients' device, written in place, so that a CUDA graph that was captured goes on to use
    them. A total norm that is not finite changes no state.

    Args:
        max_norm: ``clip.max_norm``; inf where it is null.
        nonfinite: ``clip.nonfinite``; see `handle_nonfinite`.

    Attributes:
        name: as in ``clip.policy``.
        reads: what has to be measured for it.
        looks_back: whether it needs `StepStatistics.history_norm`.
        wants_loss: whether it needs `StepStatistics.loss`.
    """

    name: ClassVar[str]
    reads: ClassVar[Reads] = "total"
    looks_back: ClassVar[bool] = True
    wants_loss: bool = False

    def __init__(self, max_norm: float = math.inf, nonfinite: str = "propagate") -> None:
        self._max_norm, self._nonfinite = max_norm, nonfinite
        self._state: dict[str, Tensor] = {}

    @abstractmethod
    def decide(self, step: StepStatistics) -> Decision:
        """What is to be done with this step's gradients. Not collective; the state goes one step on."""

    def bind(self, names: Sequence[str]) -> None:  # noqa: B027  most policies need no names
        """Say which parameters the whole model has, in the order of `StepStatistics.parameter_norms`.

        Raises:
            DistnormError: the state that was loaded is of other parameters.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on: plain numbers, strings and lists. Waits for the device."""
        return {"policy": self.name, **self._saved()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, whichever topology has written it.

        Raises:
            DistnormError: it is not this policy's; nothing has changed then.
        """
        try:
            if state["policy"] == self.name:
                self._load(state)
                return
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            pass
        raise DistnormError(f"expected the state of policy {self.name}, found {_shown(state)}")

    def _saved(self) -> dict[str, Any]:
        return {}

    def _load(self, state: Mapping[str, Any]) -> None:  # noqa: B027  not every policy has a state
        """Take the state over; any of Python's usual errors says that it doesn't fit."""

    def take_over(self, other: Policy) -> None:
        """Go on from the state of another policy of this kind, with the same parameters."""
        self._keep(other._state)

    def _keep(self, state: Mapping[str, Tensor]) -> None:
        """Write a state over the one that is there, in place where the shapes are the same."""
        for name, value in state.items():
            there = self._state.get(name)
            if there is not None and there.shape == value.shape:
                there.copy_(value)
            else:
                self._state[name] = value if there is None else value.to(there.device)

    def _state_at(self, like: Tensor) -> dict[str, Tensor]:
        """The state, where the gradients are. It may be written in place.

        In a dry run (FakeTensor, LocalTensor) it is a stand-in, and the real state stays.
        """
        if any(type(tensor) is not type(like) for tensor in self._state.values()):
            return {name: like.new_zeros(t.shape, dtype=t.dtype) for name, t in self._state.items()}
        for name, tensor in self._state.items():
            if tensor.device != like.device:
                kernels.refuse_capture(
                    f"expected policy {self.name}'s state on {like.device}, found it on {tensor.device}; "
                    "call clip() once before the capture"
                )
                self._state[name] = tensor.to(like.device)
        return self._state


def rounded(value: Tensor) -> Tensor:
    """The value rounded to fp32, as fp64."""
    return value.float().double()


def scalar(value: float) -> Tensor:
    """A 0-d fp64 tensor, for a state that has not been used yet."""
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def number(value: object) -> float:
    """A finite number from a saved state.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(value)
    return float(value)


def count(value: object) -> int:
    """A whole number of at least 0 from a saved state.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(value)
    return value


def _shown(state: object) -> str:
    text = repr(dict(state) if isinstance(state, Mapping) else state)
    return text if len(text) <= 200 else f"{text[:197]}..."
