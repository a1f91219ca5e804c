"""Inner products in fp64, of many pairs of tensors together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distnorm import kernels

_BLOCK = 1 << 20  # elements that are widened to fp64 together

Operands = tuple[Tensor | None, ...]
Combine = Callable[..., tuple[Tensor, ...]]


def sums(parts: Sequence[Operands], combine: Combine, count: int, device: torch.device) -> Tensor:
    """[count, parts] fp64: of each part the sums over what `combine` makes of its elements.

    Args:
        parts: of each, tensors of as many elements; a missing one counts as zeros, and a part without any
            adds nothing.
        combine: makes of fp64 vectors, one for each operand, `count` vectors to be added up.
        count: how many.
        device: where the sums are to be. Each part is added up where its first tensor is.
    """
    found: list[list[Tensor]] = [[] for _ in parts]
    places: dict[torch.device, list[int]] = {}
    for i, part in enumerate(parts):
        if (first := next((tensor for tensor in part if tensor is not None), None)) is not None:
            places.setdefault(first.device, []).append(i)
    for here, members in places.items():
        block, size = list[tuple[int, Operands]](), 0
        for i in members:
            for piece, numel in _pieces(parts[i], here):
                block.append((i, piece))
                size += numel
                if size >= _BLOCK:
                    _add(block, combine, found)
                    block, size = [], 0
        _add(block, combine, found)
    nothing = torch.zeros(count, dtype=torch.float64, device=device)
    columns = [
        kernels.moved(torch.stack(of_part).sum(dim=0), device) if of_part else nothing for of_part in found
    ]
    return torch.stack(columns, dim=1) if columns else nothing.view(count, 1)[:, :0]


def _pieces(part: Operands, device: torch.device) -> list[tuple[Operands, int]]:
    """The operands as vectors of reals, cut where they are long."""
    flat = [None if t is None else kernels.moved(_reals(t), device) for t in part]
    numel = next(t.numel() for t in flat if t is not None)
    cuts = range(0, numel, _BLOCK)
    return [
        (tuple(None if t is None else t[a : a + _BLOCK] for t in flat), min(_BLOCK, numel - a)) for a in cuts
    ]


def _reals(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).reshape(-1)


def _add(block: Sequence[tuple[int, Operands]], combine: Combine, found: Sequence[list[Tensor]]) -> None:
    if not block:
        return
    sizes = [next(t.numel() for t in piece if t is not None) for _, piece in block]
    like = next(t for t in block[0][1] if t is not None)
    zero = like.new_zeros((), dtype=torch.float64)
    operands = [
        torch.cat([zero.expand(n) if t is None else t.double() for t, n in zip(column, sizes, strict=True)])
        for column in zip(*(piece for _, piece in block), strict=True)
    ]
    made = torch.stack(combine(*operands))
    for (i, _), part in zip(block, torch.split(made, sizes, dim=1), strict=True):
        found[i].append(part.sum(dim=1))
