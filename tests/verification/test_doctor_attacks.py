"""What would make the doctor pass a wrong gradient, or alarm on a right one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

import distnorm
from distnorm import DistnormError, DoctorReport
from distnorm.testing import preload
from distnorm.verification.doctor.mistakes import Mistake
from tests.verification.topologies import Block, Ranks, tokens_of

preload("distnorm.verification.doctor")


def loss(model: nn.Module, seed: int = 1) -> Tensor:
    return model(tokens_of(seed)).square().mean()  # type: ignore[no-any-return]


def reference_of(model: nn.Module, seeds: Callable[[], int] = lambda: 1) -> Callable[[], nn.Module]:
    def run() -> nn.Module:
        loss(model, seeds()).backward()  # type: ignore[no-untyped-call]
        return model

    return run


def examine(model: nn.Module, reference: Any, **options: Any) -> DoctorReport:
    with distnorm.doctor(model, reference=reference, **options) as examination:
        loss(model).backward()  # type: ignore[no-untyped-call]
    assert examination.report is not None
    return examination.report


def test_a_model_is_no_reference_of_itself_after_its_backward_either() -> None:
    model = Block()
    with pytest.raises(DistnormError, match="two equal models prove nothing"):
        examine(model, model)


def test_gradients_that_add_up_over_the_references_runs_allow_nothing() -> None:
    """Modules that are called past the model itself keep their gradients from one run to the next."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = Block(), nn.Linear(8, 8)

        def loss(self) -> Tensor:
            return self.head(self.body(tokens_of())).square().mean()  # type: ignore[no-any-return]

    model, whole = Two(), Two()

    def reference() -> Two:
        whole.loss().backward()  # type: ignore[no-untyped-call]
        return whole

    for factor in (1, 3):
        model.zero_grad()
        with distnorm.doctor(model, reference=reference) as examination:
            model.loss().backward()  # type: ignore[no-untyped-call]
            assert model.head.weight.grad is not None
            model.head.weight.grad.mul_(factor)
        report = examination.report
        assert report is not None and max(verdict.tolerance for verdict in report.verdicts) < 1e-4
        assert [verdict.name for verdict in report.wrong] == ([] if factor == 1 else ["head.weight"])


def test_a_reference_that_takes_another_batch_in_each_run_is_refused() -> None:
    seeds = iter(range(1, 9))
    with pytest.raises(DistnormError, match="expected the same batch in every run"):
        examine(Block(), reference_of(Block(), lambda: next(seeds)))


def test_a_reference_that_is_random_is_refused() -> None:
    dice = torch.Generator().manual_seed(0)  # of its own: forking the usual one doesn't hold it

    class Random(Block):
        def forward(self, tokens: Tensor) -> Tensor:
            out = super().forward(tokens)
            return out * (torch.rand(out.shape, generator=dice) < 0.5)

    with pytest.raises(DistnormError, match="turn off what is random in it"):
        examine(Random(), reference_of(Random()))


def test_the_same_tokens_are_the_same_batch_in_any_dtype_and_cut() -> None:
    """As int32; and cut along the sequence, as context parallel ranks hold them."""
    for cut in (1, 2):
        model = Block()
        with distnorm.doctor(model, reference=reference_of(Block())) as examination:
            for tokens in tokens_of().int().chunk(cut, 1):
                (model(tokens).square().mean() / cut).backward()
        assert examination.report is not None and examination.report.ok, examination.report


def test_what_is_frozen_on_both_sides_needs_no_proof() -> None:
    def frozen(names: str) -> Block:
        model = Block()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(names.split())))
        return model

    report = examine(frozen("tok norm"), reference_of(frozen("tok norm")))
    assert report.ok and report.dead == () and "4 of 7 compared" in str(report)
    report = examine(frozen("tok"), reference_of(Block()))
    assert [(v.name, v.explanations[0].mistake) for v in report.wrong] == [("tok.weight", Mistake.IGNORED)]


def test_a_compiled_model_is_compared_and_its_trace_refused() -> None:
    def compiled() -> Any:
        return torch.compile(Block(), backend="eager")

    assert examine(compiled(), reference_of(Block())).ok
    with pytest.raises(
        DistnormError, match=r"the model to run eagerly where trace=True, found it under torch"
    ):
        examine(compiled(), reference_of(Block()), trace=True)


def test_a_compiled_reference_is_run_and_its_trace_refused_by_name() -> None:
    whole, inner = Block(), Block()
    inner.up = torch.compile(inner.up, backend="eager")
    whole.compile(backend="eager")
    with pytest.raises(DistnormError, match=r"the reference to run eagerly where trace=True, found it under"):
        examine(Block(), reference_of(whole), trace=True)
    with pytest.raises(DistnormError, match=r"found its module 'up' under torch\.compile"):
        examine(Block(), reference_of(inner), trace=True)


def test_a_batch_that_has_no_such_part_is_explained_without_parts() -> None:
    whole = Block()

    def reference(part: int = 0, parts: int = 1) -> Block:
        (whole(tokens_of().chunk(parts)[part]).square().mean() / parts).backward()
        return whole

    model = Block()
    with distnorm.doctor(model, reference=reference, parts=8) as examination:
        (loss(model) * 3).backward()  # type: ignore[no-untyped-call]
    assert examination.report is not None and examination.report.cause is not None
    assert examination.report.cause.explanation.mistake is Mistake.SCALED
    assert "parts are not used: it raised IndexError" in str(examination.report)


def partial(is_wrong: bool) -> DoctorReport:
    """A gradient that is partial over tp, of which the second replica along dp is another one."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model, whole = nn.Linear(6, 5, bias=False), nn.Linear(6, 5, bias=False)
    whole.load_state_dict(model.state_dict())
    rows = torch.ones(2, 6)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Replicate(), Replicate()]))

    def reference() -> nn.Module:
        whole(rows).square().mean().backward()
        return whole

    with distnorm.doctor(model, reference=reference, mesh=mesh) as examination:
        reference()
        assert whole.weight.grad is not None
        local = whole.weight.grad * (0.25, 0.75)[mesh.get_local_rank("tp")]
        if is_wrong and mesh.get_local_rank("dp"):
            local = local + torch.randn(local.shape, generator=torch.Generator().manual_seed(0))
        model.weight.grad = DTensor.from_local(local, mesh, [Replicate(), Partial()], run_check=False)
        whole.weight.grad = None
    assert examination.report is not None
    return examination.report


def test_every_replica_of_a_partial_gradient_is_compared(ranks: Ranks) -> None:
    assert ranks(4, partial, False)[0].ok
    report = ranks(4, partial, True)[0]
    (explanation,) = report.wrong[0].explanations
    assert (explanation.mistake, explanation.ranks) == (Mistake.REPLICAS, (2, 3))
