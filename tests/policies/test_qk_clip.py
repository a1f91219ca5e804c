"""QK-Clip on sharded weights and heads, against the formula on whole ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import distnorm
from distnorm import QkHeads, clip_qk_
from tests.counting import as_on_an_accelerator, collectives_and_reads

HEADS, ROWS, WIDTH = 4, 8, 3
TOPS = {"0": [50.0, 200.0, 100.0, -3.0], "1": [400.0, 1.0, math.inf, 150.0]}


def weights(layer: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries, keys (half as many heads under grouped queries), and rotary queries."""
    generator = torch.Generator().manual_seed(int(layer))
    q, k, rotary = torch.randn(3, ROWS, WIDTH, generator=generator)
    return q, (k[:4] if layer == "1" else k), rotary


def sharded() -> Any:
    mesh = init_device_mesh("cpu", (2, 2))
    placements = [
        [_StridedShard(0, split_factor=2), Shard(0)],
        [Shard(1), Replicate()],
        [Replicate(), Shard(0)],
    ]
    layers = {}
    for layer, tops in TOPS.items():
        of = [
            nn.Parameter(distribute_tensor(w, mesh, p, src_data_rank=None))
            for w, p in zip(weights(layer), placements, strict=True)
        ]
        mine = [
            top - dist.get_rank() if i % 2 == dist.get_rank() % 2 else -math.inf for i, top in enumerate(tops)
        ]
        pairs = [(of[0], 0.5), (of[1], 0.5), (of[2], 1.0)]
        layers[layer] = QkHeads(torch.tensor(mine), pairs, groups=2 if layer == "1" else None)
    with as_on_an_accelerator():
        gammas: Any = None

        def clip() -> None:
            nonlocal gammas
            gammas = clip_qk_(layers, 100.0)

        costs = collectives_and_reads(clip)
    whole = {layer: [w.full_tensor().detach() for w, _ in heads.weights if isinstance(w, DTensor)]
             for layer, heads in layers.items()}  # fmt: skip
    return costs, {layer: gamma.tolist() for layer, gamma in gammas.items()}, whole


@pytest.mark.slow
def test_heads_and_weights_may_be_anywhere(ranks: Any) -> None:
    # Even heads are on ranks 0 and 2, odd ones on 1 and 3, each 1 lower than on the rank before.
    tops = {"0": [50.0, 199.0, 100.0, -4.0], "1": [400.0, 0.0, math.inf, 149.0]}
    for costs, gammas, whole in ranks(4, sharded):
        assert costs[0] == {"c10d::allreduce_": 1}  # what is read is the mesh, in the host's memory
        for layer, found in gammas.items():
            grouped = tops[layer] if layer == "0" else [400.0, math.inf]
            exact = [100.0 / top if math.isfinite(top) and top > 100 else 1.0 for top in grouped]
            assert found == pytest.approx(exact, rel=1e-12)
            for after, before, exponent in zip(whole[layer], weights(layer), (0.5, 0.5, 1.0), strict=True):
                rows = len(before) // len(exact)
                factors = torch.tensor(exact, dtype=torch.float64).repeat_interleave(rows) ** exponent
                expected = (before.double() * factors.view(-1, 1)).float()
                torch.testing.assert_close(after, expected, rtol=1e-7, atol=0)


def test_one_process_and_logits_are_bounded() -> None:
    torch.manual_seed(0)
    q, k = (nn.Parameter(torch.randn(ROWS, WIDTH, dtype=torch.float64)) for _ in range(2))
    x = torch.randn(20, WIDTH, dtype=torch.float64)

    def tops() -> Tensor:
        a, b = ((x @ w.detach().T).view(20, HEADS, -1).transpose(0, 1) for w in (q, k))
        return (a @ b.transpose(1, 2)).amax(dim=(1, 2))

    before = tops()
    gammas = clip_qk_({"a": QkHeads(before, [(q, 0.5), (k, 0.5)])}, threshold=2.0)
    assert (before > 2).any()
    torch.testing.assert_close(tops(), before.clamp(max=2.0), rtol=1e-12, atol=0)
    torch.testing.assert_close(gammas["a"], (2.0 / before).clamp(max=1.0))
    assert clip_qk_({}) == {}


def test_mistakes() -> None:
    w = nn.Parameter(torch.ones(6, 2))
    for heads, threshold, message in (
        (QkHeads(torch.ones(4), [(w, 1.0)]), 1.0, "divided among 4 heads"),
        (QkHeads(torch.ones(3), [(w, 1.0)], groups=2), 1.0, "divided among 2 heads"),
        (QkHeads(torch.ones(3), [(w, 1.0)]), 0.0, "a number above 0"),
    ):
        with pytest.raises(distnorm.DistnormError, match=message):
            clip_qk_({"a": heads}, threshold)
