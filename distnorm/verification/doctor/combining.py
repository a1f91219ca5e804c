"""A wrong gradient as a combination of what the parts of the batch give, and what its weights mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distnorm.verification.doctor.mistakes import (
    Circumstances,
    Explanation,
    Mistake,
    nearly,
    show_factor,
)

_CLOSE = 5e-3  # of a weight and a simple number, where the fit itself is good
_ROWS = 1 << 13  # elements that are looked at in fp64 at a time


def weights_of(value: Tensor, parts: Sequence[Tensor], tolerance: float) -> list[float] | None:
    """The weights with which tensors add up to another one; `None` where they don't.

    Args:
        value: the sum.
        parts: tensors of its shape.
        tolerance: the relative difference that rounding explains.
    """
    if value.numel() < 2 * len(parts) + 2:  # anything is a combination of enough vectors
        return _one_alone(value.double(), [part.double() for part in parts], tolerance)
    columns = [tensor.reshape(-1) for tensor in (*parts, value)]
    squares = sum(rows.square().sum(0) for rows in _rows(columns))
    assert isinstance(squares, Tensor)
    *norms, length = squares.sqrt().clamp_min(1e-300)
    scales = torch.stack([*norms, torch.ones_like(length)])
    triangle = torch.empty(0, len(columns), dtype=torch.float64, device=value.device)
    for rows in _rows(columns):  # least squares has the same solution as of all rows at once
        triangle = torch.linalg.qr(torch.cat([triangle, rows / scales]), mode="r").R
    solved = torch.linalg.lstsq(triangle[:, :-1], triangle[:, -1:], driver="gelsd").solution.view(-1)
    size = max(float(length), float(solved.abs().max()))
    weights = solved / scales[:-1]
    rest = sum(float((rows[:, :-1] @ weights - rows[:, -1]).square().sum()) for rows in _rows(columns))
    return weights.tolist() if rest**0.5 <= 4 * tolerance * size else None


def _rows(columns: Sequence[Tensor]) -> Iterator[Tensor]:
    """Some rows of a matrix in fp64 after the others, of its columns: all at once would be a large copy."""
    for start in range(0, columns[0].numel(), _ROWS):
        yield torch.stack([column[start : start + _ROWS].double() for column in columns], 1)


def _one_alone(value: Tensor, parts: Sequence[Tensor], tolerance: float) -> list[float] | None:
    """Weights that are zero but for one, where few elements leave no other choice."""
    for at, part in enumerate(parts if value.numel() > 2 else ()):
        square = float((part * part).sum())
        factor = float((value * part).sum()) / square if square else 0.0
        if factor and float((value - factor * part).norm()) <= 4 * tolerance * float(value.norm()):
            return [factor if i == at else 0.0 for i in range(len(parts))]
    return None


def read_parts(weights: Sequence[float], tolerance: float, around: Circumstances) -> Explanation:
    """What the weights of the parts of the batch mean; they are not all alike.

    Args:
        weights: one for each part; 1 for all of them is the right gradient.
        tolerance: the relative difference that rounding explains.
        around: the run's axes and its micro-batches.
    """
    held = [i for i, weight in enumerate(weights) if abs(weight) > _CLOSE]
    first = weights[held[0]] if held else 0.0
    if held and all(nearly(weights[i], first, _CLOSE) for i in held):
        which = f"part{'s' if len(held) > 1 else ''} {', '.join(map(str, held))} of {len(weights)}"
        times = "" if nearly(first, 1, _CLOSE) else f"{show_factor(first)} times "
        text = f"it is {times}the gradient of {which} of the batch alone"
        return Explanation(Mistake.UNREDUCED, text, factor=first)
    count = around.microbatches
    if count > 1 and len(weights) % count == 0:
        by_turn = [weights[turn::count] for turn in range(count)]
        if all(nearly(w, turn[0], _CLOSE) for turn in by_turn for w in turn):
            ratios = [by_turn[t][0] / by_turn[t + 1][0] for t in range(count - 1) if by_turn[t + 1][0]]
            if len(ratios) == count - 1 and ratios[0] > 1 and all(nearly(r, ratios[0], 0.02) for r in ratios):
                size = round(ratios[0])
                axes = tuple(axis for axis in around.axes if around.size(axis) == size)
                text = (
                    "the gradient accumulated so far was reduced again in each micro-batch"
                    + (f", over {' or '.join(axes)}" if axes else "")
                    + f": the {count} micro-batches weigh {', '.join(show_factor(t[0]) for t in by_turn)}"
                )
                return Explanation(Mistake.REDUCED_AGAIN, text, axes=axes, factor=ratios[0])
    text = (
        "the parts of the batch weigh "
        + ", ".join(show_factor(round(weight, 4)) if abs(weight) > _CLOSE else "0" for weight in weights)
        + " in place of 1 each"
    )
    return Explanation(Mistake.UNEQUAL, text)
