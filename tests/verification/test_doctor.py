"""The doctor names every planted mistake, and finds nothing where nothing is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distnorm
from distnorm import DistnormError, DoctorReport
from distnorm.testing import preload
from distnorm.verification.doctor import blocks, dumping, examining
from distnorm.verification.doctor.mistakes import Mistake
from tests.verification.topologies import Block, Ranks, tokens_of

preload("distnorm.verification.doctor")


def reference_of(rows: Tensor, change: Callable[[Block], None] = lambda model: None) -> Callable[..., Block]:
    """The whole model in one process, over all or some of the rows."""
    model = Block()
    change(model)

    def run(part: int = 0, parts: int = 1) -> Block:
        (model(rows.chunk(parts)[part]).square().mean() / parts).backward()
        return model

    return run


def alone(
    spoil: Callable[[Block], None] = lambda model: None,
    *,
    before: Callable[[Block], None] = lambda model: None,
    rows: Tensor | None = None,
    reference: Any = None,
) -> DoctorReport:
    """One process against itself, its gradients spoilt after the backward."""
    model = Block()
    before(model)
    with distnorm.doctor(model, reference=reference or reference_of(tokens_of())) as examination:
        model(tokens_of() if rows is None else rows).square().mean().backward()
        spoil(model)
    assert examination.report is not None
    return examination.report


def found(report: DoctorReport, name: str) -> set[Mistake]:
    return {e.mistake for v in report.verdicts if v.name == name for e in v.explanations}


def times(factor: float) -> Callable[[Block], None]:
    return lambda model: torch._foreach_mul_([p.grad for p in model.parameters()], factor)  # type: ignore[arg-type]


def grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_right_gradients_are_right() -> None:
    report = alone()
    assert report.ok and report.cause is None and report.wrong == ()
    assert all(v.difference == 0 and v.tolerance < 1e-5 for v in report.verdicts)
    assert "every gradient is right" in str(report)
    assert report.verdicts[0].name == "tok.weight"


@pytest.mark.parametrize("most", [None, 24])
@pytest.mark.parametrize(
    ("spoil", "mistake", "text"),
    [
        (lambda m: m.up.weight.grad.mul_(1.5), Mistake.SCALED, "1.5 times"),
        (lambda m: m.up.weight.grad.mul_(1024), Mistake.SCALED, "a loss scale of 2^10"),
        (lambda m: m.up.weight.grad.neg_(), Mistake.SCALED, "its sign is turned"),
        (lambda m: m.up.weight.grad.zero_(), Mistake.ZERO, "zero on every rank"),
        (lambda m: setattr(m.up.weight, "grad", None), Mistake.IGNORED, "no rank has a gradient"),
        (lambda m: m.up.weight.grad.copy_(grad(m.up.weight).flip(0)), Mistake.PERMUTED, "other places"),
        (
            lambda m: m.up.weight.grad.copy_(grad(m.up.weight).t().reshape(16, 8).clone()),
            Mistake.TRANSPOSED,
            "transposed",
        ),
        (lambda m: m.up.weight.grad.fill_(float("nan")), Mistake.NON_FINITE, "not finite"),
        (
            lambda m: m.up.weight.grad.add_(torch.randn(16, 8, generator=torch.Generator().manual_seed(0))),
            Mistake.UNEXPLAINED,
            "no mistake",
        ),
    ],
)
def test_a_spoilt_gradient_is_named(
    spoil: Any, mistake: Mistake, text: str, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one block, or in blocks of three rows, of which the worst is looked at first."""
    if most is not None:
        monkeypatch.setattr(blocks, "ELEMENTS", most)
        monkeypatch.setattr(examining, "WHOLE", most)
    report = alone(spoil)
    assert any("the block of each piece" in note for note in report.notes) == (most is not None)
    assert not report.ok and [v.name for v in report.wrong] == ["up.weight"]
    assert found(report, "up.weight") == {mistake}
    assert text in str(report)
    assert report.cause is not None and report.cause.where == "up.weight"


def test_a_factor_that_all_have_is_one_cause() -> None:
    report = alone(times(0.25))
    assert report.cause is not None and report.cause.where == "every parameter"
    assert "1/4 times the right one" in report.cause.explanation.text


def test_a_stale_gradient_is_named() -> None:
    def old(model: Block) -> None:
        model(tokens_of(9)).square().mean().backward()

    def keep(model: Block) -> None:
        grad(model.up.weight).copy_(kept)

    model = Block()
    old(model)
    kept = grad(model.up.weight).clone()
    assert found(alone(keep, before=old), "up.weight") == {Mistake.STALE}


def test_gradients_that_were_not_set_to_zero_are_named() -> None:
    report = alone(before=lambda model: model(tokens_of(9)).square().mean().backward())
    assert found(report, "up.weight") == {Mistake.NOT_ZEROED}


def test_other_weights_are_said_first() -> None:
    def change(model: Block) -> None:
        with torch.no_grad():
            model.down.bias[0] += 1e-3

    report = alone(before=change)
    assert report.cause is not None and report.cause.explanation.mistake is Mistake.WEIGHTS
    assert report.cause.where == "down.bias"


def test_another_batch_is_said() -> None:
    report = alone(rows=tokens_of(2))
    assert report.cause is not None and report.cause.explanation.mistake is Mistake.BATCH
    assert report.batch is not None and "4 of the reference's are missing" in report.batch


def test_dead_models_prove_nothing() -> None:
    def dead(model: Block) -> None:
        with torch.no_grad():
            model.norm.weight.zero_()
            model.norm.bias.zero_()
            model.up.bias.fill_(-1.0)  # no unit of the hidden layer is on

    reference = reference_of(tokens_of(), dead)
    report = alone(before=dead, reference=reference)
    assert not report.ok and report.wrong == ()
    assert {"up.weight", "up.bias", "norm.weight"} <= set(report.dead)
    assert "proves nothing" in str(report)


def test_a_model_is_no_reference_of_itself() -> None:
    model = Block()

    def same() -> Block:
        model(tokens_of()).square().mean().backward()
        return model

    with (
        pytest.raises(DistnormError, match="expected a model of its own"),
        distnorm.doctor(model, reference=same),
    ):
        pass


def test_a_missing_parameter_and_a_strange_one_are_said() -> None:
    class Other(Block):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Parameter(torch.zeros(1))

    other = Other()

    def run() -> Block:
        other(tokens_of()).square().mean().backward()
        return other

    assert found(alone(reference=run), "extra") == {Mistake.MISSING}
    model = Other()
    with distnorm.doctor(model, reference=reference_of(tokens_of())) as examination:
        model(tokens_of()).square().mean().backward()
    assert examination.report is not None and found(examination.report, "extra") == {Mistake.EXTRA}


def test_a_frozen_parameter_that_learns_is_named() -> None:
    def freeze(model: Block) -> None:
        model.tok.weight.requires_grad_(False)

    reference = reference_of(tokens_of(), freeze)
    assert found(alone(reference=reference), "tok.weight") == {Mistake.FROZEN}


def test_a_model_that_ran_is_a_reference() -> None:
    model, other = Block(), Block()
    with distnorm.doctor(model, reference=other) as examination:
        for one in (model, other):
            one(tokens_of()).square().mean().backward()
        grad(model.up.bias).mul_(2)
    assert examination.report is not None
    assert [v.name for v in examination.report.wrong] == ["up.bias"]
    assert "only a callable reference can be shaken" in str(examination.report)


def test_a_dump_is_a_reference(tmp_path: Any) -> None:
    model = Block()
    model(tokens_of()).square().mean().backward()
    distnorm.dump(model, tmp_path / "dump", batch=tokens_of())
    assert alone(reference=tmp_path / "dump").ok
    assert found(alone(times(2), reference=tmp_path / "dump"), "up.weight") == {Mistake.SCALED}
    assert "the batch" in str(alone(rows=tokens_of(2), reference=tmp_path / "dump"))
    with pytest.raises(DistnormError, match="found one in"):
        distnorm.dump(model, tmp_path / "dump")
    with pytest.raises(DistnormError, match=r"expected a folder that distnorm\.dump wrote"):
        alone(reference=tmp_path)


def test_a_torch_that_cannot_write_dumps_is_refused_by_its_version(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dumping.state_dict_saver, "save", lambda state, *, process_group=None: None)
    for call in (lambda: distnorm.dump(Block(), tmp_path / "dump"), lambda: alone(reference=tmp_path)):
        with pytest.raises(
            DistnormError, match=rf"as 2\.9 has it; found torch {re.escape(torch.__version__)}"
        ):
            call()
    assert not (tmp_path / "dump").exists()


def test_a_reference_that_changes_its_weights_is_refused() -> None:
    whole = Block()

    def run() -> Block:
        whole(tokens_of()).square().mean().backward()
        torch.optim.SGD(whole.parameters(), lr=0.1).step()
        return whole

    with pytest.raises(DistnormError, match="expected a run that leaves its weights as they are"):
        alone(reference=run)


def test_the_report_is_json_and_a_page() -> None:
    report = alone(times(3))
    facts = json.loads(report.to_json())
    assert facts["ok"] is False and facts["parameters"][0]["explanations"][0]["mistake"] == "scaled"
    html = report.to_html()
    assert 'class="layer wrong"' in html and "tok.weight" in html and "3 times the right one" in html
    assert 'class="layer right"' in alone().to_html()


def test_a_trace_says_after_which_module_two_runs_part() -> None:
    """In one micro-batch of two, of which the other is right."""
    model, calls = Block(), [0]

    def thrice(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        calls[0] += 1
        return output * 3 if calls[0] == 2 else output

    for spoils in (False, True):
        calls[0] = 0 if spoils else 2
        hook = model.norm.register_forward_hook(thrice)
        model.zero_grad()
        with distnorm.doctor(
            model, reference=reference_of(tokens_of()), parts=2, microbatches=2, trace=True
        ) as examination:
            for rows in tokens_of().chunk(2):
                (model(rows).square().mean() / 2).backward()
        hook.remove()
        report = examination.report
        assert report is not None and report.ok is not spoils
    assert report.forward is not None and report.forward.place == "in norm"
    (found,) = report.forward.explanations
    assert (found.mistake, found.factor) == (Mistake.SCALED, pytest.approx(3))
    assert report.cause is not None and report.cause.parameters == ("norm.weight", "norm.bias")


# ---- on several ranks


def all_rows() -> Tensor:
    return torch.cat([tokens_of(1 + rank) for rank in range(dist.get_world_size())])


def mine() -> Tensor:
    return tokens_of(1 + dist.get_rank())


def ddp(fault: str) -> DoctorReport:
    model = DistributedDataParallel(Block())
    with distnorm.doctor(model, reference=reference_of(all_rows()), parts=2) as examination:
        if fault == "no_sync":
            with model.no_sync():
                model(mine()).square().mean().backward()
        else:
            rows = tokens_of(1) if fault == "same rows" else mine()
            model(rows).square().mean().backward()
        if fault == "diverged" and dist.get_rank() == 1:
            grad(model.module.down.bias)[3] += 1
    assert examination.report is not None
    return examination.report


def same(reports: list[DoctorReport]) -> DoctorReport:
    assert len({str(report) for report in reports}) == 1
    return reports[0]


def test_ddp_is_right_and_what_it_forgets_is_named(ranks: Ranks) -> None:
    assert same(ranks(2, ddp, "")).ok
    report = same(ranks(2, ddp, "no_sync"))
    assert {m for v in report.verdicts for m in found(report, v.name)} == {Mistake.UNREDUCED}
    assert "never averaged over ddp: the mean of the 2 ranks' gradients is the right one" in str(report)
    report = same(ranks(2, ddp, "diverged"))
    assert [v.name for v in report.wrong] == ["down.bias"]
    assert found(report, "down.bias") == {Mistake.REPLICAS} and "rank 1 hold" in str(report)
    report = same(ranks(2, ddp, "same rows"))
    assert report.cause is not None and report.cause.explanation.mistake is Mistake.BATCH


def fsdp(fault: str, most: int | None = None) -> DoctorReport:
    if most is not None:
        blocks.ELEMENTS = examining.WHOLE = most
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    model = Block()
    fully_shard(model, mesh=mesh)
    if fault == "own tokens":
        original = torch.distributed.reduce_scatter_single

        def own(output: Tensor, input: Tensor, **_: Any) -> None:
            output.copy_(input.view(2, -1)[dist.get_rank()].view_as(output))

        torch.distributed.reduce_scatter_single = own
    with distnorm.doctor(model, reference=reference_of(all_rows()), parts=2, trace=True) as examination:
        model(mine()).square().mean().backward()
        if fault == "swapped":
            local = model.up.weight.grad.to_local()  # type: ignore[union-attr]
            theirs = [torch.empty_like(local) for _ in range(2)]
            dist.all_gather(theirs, local)
            local.copy_(theirs[1 - dist.get_rank()])
    if fault == "own tokens":
        torch.distributed.reduce_scatter_single = original
    assert examination.report is not None
    return examination.report


def test_fsdp2_is_right_and_what_it_forgets_is_named(ranks: Ranks) -> None:
    assert same(ranks(2, fsdp, "")).ok
    report = same(ranks(2, fsdp, "own tokens"))
    assert found(report, "up.weight") == {Mistake.UNREDUCED}
    (explanation,) = next(v for v in report.wrong if v.name == "up.weight").explanations
    assert (
        explanation.axes == ("dp_shard",) and "part 0 of 2 of the batch alone on rank 0" in explanation.text
    )
    report = same(ranks(2, fsdp, "own tokens", 24))  # blocks of three rows, of eight that a rank holds
    (explanation,) = next(v for v in report.wrong if v.name == "up.weight").explanations
    assert explanation.mistake is Mistake.UNREDUCED and explanation.axes == ("dp_shard",)
    report = same(ranks(2, fsdp, "swapped", 24))
    assert [v.name for v in report.wrong] == ["up.weight"]
    assert found(report, "up.weight") == {Mistake.SWAPPED}
    assert "in place of [0:8, 0:8] it is [8:16, 0:8], the piece of rank 1" in str(report)


def again(count: int, size_matters: bool) -> DoctorReport:
    """A replicated weight whose accumulated gradient is reduced in each micro-batch, as a hook would."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    rows = torch.randn(4 * count, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model, whole = nn.Linear(6, 5), nn.Linear(6, 5)
    whole.load_state_dict(model.state_dict())

    def loss(model: nn.Module, rows: Tensor, columns: slice) -> Tensor:
        return model(rows)[:, columns].pow(2).sum() / (4 * count)

    def reference(part: int = 0, parts: int = 1) -> nn.Module:
        loss(whole, rows.chunk(parts)[part], slice(0, 5)).backward()
        return whole

    columns = (slice(0, 3), slice(3, 5))[dist.get_rank()]
    with distnorm.doctor(
        model, reference=reference, mesh=mesh, parts=count, microbatches=count
    ) as examination:
        for some in rows.chunk(count):
            loss(model, some, columns).backward()
            if size_matters:
                for parameter in model.parameters():
                    dist.all_reduce(parameter.grad)
        if not size_matters:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
    assert examination.report is not None
    return examination.report


def test_a_gradient_that_is_reduced_again_in_each_micro_batch_is_named(ranks: Ranks) -> None:
    assert same(ranks(2, again, 3, False)).ok
    for count in (2, 3):
        report = same(ranks(2, again, count, True))
        assert found(report, "weight") == {Mistake.REDUCED_AGAIN}
        (explanation,) = report.wrong[0].explanations
        assert explanation.axes == ("tp",) and explanation.factor == pytest.approx(2)


def two_axes(over: str) -> DoctorReport:
    """A weight that ranks along tp hold summands of, and ranks along dp a mean of, reduced over some axes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model, whole = nn.Linear(6, 5), nn.Linear(6, 5)
    whole.load_state_dict(model.state_dict())

    def reference(part: int = 0, parts: int = 1) -> nn.Module:
        some = rows.chunk(parts)[part]
        (whole(some).pow(2).sum() / 8).backward()
        return whole

    columns = (slice(0, 3), slice(3, 5))[mesh.get_local_rank("tp")]
    with distnorm.doctor(model, reference=reference, mesh=mesh, parts=2) as examination:
        some = rows.chunk(2)[mesh.get_local_rank("dp")]
        (model(some)[:, columns].pow(2).sum() / 4).backward()
        for parameter in model.parameters():
            for axis in over.split():
                dist.all_reduce(parameter.grad, group=mesh.get_group(axis))
            if "dp" in over:
                parameter.grad /= 2  # type: ignore[operator]
    assert examination.report is not None
    return examination.report


def test_the_axis_of_a_missing_reduction_is_named(ranks: Ranks) -> None:
    assert same(ranks(4, two_axes, "dp tp")).ok
    for done, missing in (("dp", "tp"), ("tp", "dp")):
        report = same(ranks(4, two_axes, done))
        assert found(report, "weight") == {Mistake.UNREDUCED}
        assert report.wrong[0].explanations[0].axes == (missing,)
    report = same(ranks(4, two_axes, "dp tp tp"))
    assert found(report, "weight") == {Mistake.SCALED}
    assert report.wrong[0].explanations[0].factor == pytest.approx(2)
