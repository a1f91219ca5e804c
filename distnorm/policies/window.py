"""The newest finite values, on the device: how many there are is known only there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distnorm.policies.policy import number, scalar


def window(size: int, values: Sequence[object] = ()) -> dict[str, Tensor]:
    """A window and what it holds.

    Args:
        size: how many it can hold.
        values: finite numbers, the newest last; more than fit are the oldest left out.

    Returns:
        ``values``: fp64 [size], the newest last, and inf where there is none yet; ``count``: 0-d fp64.

    Raises:
        ValueError: a value is no finite number.
    """
    held = [number(value) for value in values][-size:]
    padded = [math.inf] * (size - len(held)) + held
    values_held = torch.tensor(padded, dtype=torch.float64, device="cpu")
    return {"values": values_held, "count": scalar(len(held))}


def push(state: dict[str, Tensor], value: Tensor, enters: Tensor) -> None:
    """Let a 0-d value enter, in place, where the 0-d bool says so."""
    values = state["values"]
    values.copy_(torch.where(enters, torch.cat((values[1:], value.view(1))), values))
    state["count"].add_(enters).clamp_(max=values.numel())


def held(state: dict[str, Tensor]) -> list[float]:
    """What is in the window, the newest last. Waits for the device."""
    return [value for value in state["values"].tolist() if math.isfinite(value)]
