"""Sketches of tensors: a few dot products with fixed random signs, by which linear mistakes are recognised.

A sketch is linear, so what holds for tensors (one is twice the other, several add up to a third) holds for
their sketches; and what doesn't hold for tensors holds for their sketches with no probability to speak of.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

SIZE = 32
"""Numbers in a sketch."""

Box = tuple[tuple[int, int, int], ...]
"""For each dim but the first ``(start, stop, whole size)`` of what a piece holds."""


def sketch_rows(tensor: Tensor, box: Box) -> Tensor:
    """Sketch each row of a tensor.

    Args:
        tensor: [rows, ...], the piece itself.
        box: where the piece lies in the whole tensor.

    Returns:
        [rows, SIZE] fp64 on the CPU.
    """
    values = tensor.detach().to(torch.float64).unsqueeze(-1)
    for dim in range(len(box) - 1, -1, -1):  # the last dim first: [rows, a, b, k] -> [rows, a, k]
        start, stop, size = box[dim]
        signs = _signs(dim, size).to(values.device)[start:stop]
        values = (values * signs).sum(-2) if values.shape[-1] > 1 else values.squeeze(-1) @ signs
    return values.expand(-1, SIZE).cpu()


@lru_cache(maxsize=64)
def _signs(dim: int, size: int) -> Tensor:
    dice = torch.Generator("cpu").manual_seed(dim * 7919 + size)
    return torch.randint(0, 2, (size, SIZE), generator=dice, device="cpu").double() * 2 - 1
