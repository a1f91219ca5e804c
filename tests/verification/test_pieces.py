"""The oracle's own parts: index sets and norms."""

from __future__ import annotations

import math

import pytest
import torch

from distnorm.verification.pieces import combine, dim_runs, p_norm


@pytest.mark.parametrize("size", [0, 1, 3, 8, 9])
@pytest.mark.parametrize("axes", [((2, 1), (3, 1)), ((3, 2), (2, 1)), ((2, 6), (3, 2), (2, 1)), ((4, 3),)])
def test_pieces_of_a_dim_partition_it(size: int, axes: tuple[tuple[int, int], ...]) -> None:
    """`axes` are (size of the mesh axis, split factor)."""
    found: list[int] = []
    for coordinate in torch.cartesian_prod(*[torch.arange(parts) for parts, _ in axes]).reshape(
        -1, len(axes)
    ):
        cuts = [(parts, int(c), factor) for (parts, factor), c in zip(axes, coordinate, strict=True)]
        found += [i for low, high in dim_runs(size, cuts) for i in range(low, high)]
    assert sorted(found) == list(range(size))


def test_strided_pieces_are_cut_right_to_left() -> None:
    """9 rows over tp=2 first, then over dp=4, as FSDP2 does it on top of tensor parallel."""
    rows = torch.arange(9)
    for dp in range(4):
        for tp_rank in range(2):
            of_tp = rows.chunk(2)[tp_rank]
            made = [*of_tp.chunk(4), *[of_tp[:0]] * 4][dp]
            runs = dim_runs(9, [(4, dp, 2), (2, tp_rank, 1)])
            assert [i for low, high in runs for i in range(low, high)] == made.tolist()


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 8.0, math.inf])
def test_norm_of_extremes(p: float) -> None:
    tensor = torch.tensor([1e200, -1e200, 1e-200], dtype=torch.float64)
    assert math.isclose(p_norm(tensor, p), 1e200 * (1 if p == math.inf else 2 ** (1 / p)), rel_tol=1e-12)
    assert math.isclose(combine([3e200, 4e200], 2.0), 5e200)
    assert math.isnan(combine([math.nan, math.inf], p)) and combine([], p) == 0.0
