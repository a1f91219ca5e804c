"""verify and the doctor take declared pieces of plain tensors, and gradients elsewhere than in `grad`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distnorm
from distnorm import DoctorReport, VerifyReport
from distnorm.testing import preload
from tests.verification.topologies import CLIP, Ranks, check_of

preload("distnorm.verification.doctor")


def whole() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(4, 6, bias=False)


def rows() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(4))


def loss(output: Tensor) -> Tensor:
    return output.square().sum()


class Half(nn.Module):
    """This rank's output units, cut by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(whole().weight.detach().chunk(2)[dist.get_rank()].clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


def move(model: nn.Module, factor: float) -> None:
    """Gradients are moved to `main_grad`, as Megatron's are."""
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.main_grad = parameter.grad * factor  # type: ignore[attr-defined]
        parameter.grad = None


def as_piece(name: str, tensor: Tensor) -> distnorm.Piece:
    low = 3 * dist.get_rank()
    return distnorm.Piece(((low, low + 3), (0, 4)), (6, 4))


def declared(by_function: bool, factor: float) -> tuple[VerifyReport, DoctorReport, list[Any]]:
    model, reference = Half(), whole()
    sharded: Any = as_piece if by_function else {"weight": (0, dist.group.WORLD)}
    where: Any = (lambda p: getattr(p, "main_grad", None)) if by_function else "main_grad"

    def run() -> nn.Module:
        loss(reference(rows())).backward()  # type: ignore[no-untyped-call]
        return reference

    with distnorm.doctor(model, reference=run, sharded=sharded, grad_of=where) as examination:
        loss(model(rows())).backward()  # type: ignore[no-untyped-call]
        move(model, factor)
    assert examination.report is not None
    before = model.weight.main_grad.clone()
    report = distnorm.verify(model, CLIP, sharded=sharded, grad_of=where)
    return report, examination.report, [torch.equal(before, model.weight.main_grad), model.weight.grad]


def test_declared_pieces_and_gradients_elsewhere(ranks: Ranks) -> None:
    dense = whole()
    loss(dense(rows())).backward()  # type: ignore[no-untyped-call]
    assert dense.weight.grad is not None
    true = float(dense.weight.grad.double().norm())
    for by_function in (False, True):
        for report, found, kept in ranks(2, declared, by_function, 1.0):
            assert report.ok and found.ok and kept == [True, None], f"{report}\n{found}"
            assert report.elements == 24 and abs(report.true_norm / true - 1) < 1e-6
            assert check_of(report, "coverage").ok
    for report, found, _ in ranks(2, declared, False, 3.0):
        assert report.ok and found.wrong[0].scale is not None and abs(found.wrong[0].scale - 3) < 1e-5


def undeclared() -> VerifyReport:
    model = Half()
    loss(model(rows())).backward()  # type: ignore[no-untyped-call]
    return distnorm.verify(model, CLIP)


def test_undeclared_pieces_are_no_replicas(ranks: Ranks) -> None:
    """Without the declaration the two halves pass for replicas, which have other values."""
    assert not any(report.ok for report in ranks(2, undeclared))
