"""Kinds of mistakes that public reports tell of (Megatron-LM #7452 and its kin), in our own words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F

import distnorm
from distnorm import DoctorReport
from distnorm.testing import preload
from distnorm.verification.doctor.mistakes import Explanation, Mistake
from tests.verification.topologies import Ranks

preload("distnorm.verification.doctor")

HEADS, WIDTH, DIM, WORDS = 4, 3, 6, 8


class Sum(torch.autograd.Function):
    """A sum over ranks forward, and nothing backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class Copy(torch.autograd.Function):
    """Nothing forward, and a sum over ranks backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class Heads(nn.Module):
    """Heads that share one norm, and a projection to words; under a mesh, this rank's heads and words."""

    def __init__(self, mesh: Any = None) -> None:
        super().__init__()
        dice = torch.Generator().manual_seed(0)
        self.mesh = mesh
        self.tok = nn.Embedding(WORDS, DIM)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(DIM, WORDS, bias=False)
        self.up = nn.Parameter(torch.randn(HEADS, WIDTH, DIM, generator=dice))
        self.down = nn.Parameter(torch.randn(HEADS, WIDTH, DIM, generator=dice))
        with torch.no_grad():
            for parameter in (self.tok.weight, self.head.weight):
                parameter.copy_(torch.randn(parameter.shape, generator=dice))
        if mesh is not None:
            self.up, self.down = (self._cut(parameter) for parameter in (self.up, self.down))
            self.head.weight = self._cut(self.head.weight)

    def _cut(self, parameter: Tensor) -> nn.Parameter:
        return nn.Parameter(distribute_tensor(parameter.detach(), self.mesh, [Shard(0)], src_data_rank=None))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok(tokens)
        up, down, words = (_local(p) for p in (self.up, self.down, self.head.weight))
        held = self.norm(torch.einsum("bsd,hwd->bshw", x if self.mesh is None else Copy.apply(x), up))
        out = torch.einsum("bshw,hwd->bsd", torch.tanh(held), down)
        x = x + (out if self.mesh is None else Sum.apply(out))
        return F.linear(x if self.mesh is None else Copy.apply(x), words)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def examined(
    model: nn.Module, reference: Callable[..., nn.Module], step: Callable[[], None], **options: Any
) -> DoctorReport:
    with distnorm.doctor(model, reference=reference, **options) as examination:
        step()
    assert examination.report is not None
    return examination.report


def explanations(reports: list[DoctorReport], name: str) -> list[Explanation]:
    assert len({str(report) for report in reports}) == 1
    return [e for v in reports[0].verdicts if v.name == name for e in v.explanations]


def tokens() -> Tensor:
    return torch.arange(20).mul(7).view(4, 5) % WORDS


def parallel_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits whose words are cut over the ranks."""
    first = dist.get_rank() * logits.shape[-1]
    is_mine = (targets >= first) & (targets < first + logits.shape[-1])
    here = (targets - first).clamp(0, logits.shape[-1] - 1).unsqueeze(-1)
    picked = logits.gather(-1, here).squeeze(-1) * is_mine
    return (Sum.apply(logits.exp().sum(-1)).log() - Sum.apply(picked)).mean()


def heads(fault: str) -> DoctorReport:
    """Tensor parallel heads; what is shared by them has summands of its gradient on every rank."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model, whole = Heads(mesh), Heads()

    def reference() -> nn.Module:
        F.cross_entropy(whole(tokens()).flatten(0, 1), tokens().roll(1).flatten()).backward()
        return whole

    def step() -> None:
        logits = model(tokens())
        if fault == "gathered":  # as if each rank's logits were all words' already
            logits = torch.cat([logits, logits.detach()], -1)
        parallel_loss(logits, tokens().roll(1)).backward()
        for parameter in model.norm.parameters() if fault != "norm" else ():
            dist.all_reduce(parameter.grad)

    return examined(model, reference, step, mesh=mesh, trace=fault == "gathered")


def test_a_shared_norm_whose_gradient_no_rank_sums_is_named(ranks: Ranks) -> None:
    """As of a norm over heads that are cut by tp, summed only where sequence parallel is on."""
    assert ranks(2, heads, "")[0].ok
    reports = ranks(2, heads, "norm")
    assert [v.name for v in reports[0].wrong] == ["norm.weight", "norm.bias"]
    (found,) = explanations(reports, "norm.weight")
    assert (found.mistake, found.axes, found.factor) == (Mistake.UNREDUCED, ("tp",), 1.0)


def test_logits_that_are_gathered_before_a_loss_of_cut_ones_are_found(ranks: Ranks) -> None:
    report = ranks(2, heads, "gathered")[0]
    assert len(report.wrong) == len(report.verdicts)
    assert report.forward is None and report.backward is not None
    assert report.cause is not None and report.cause.where.startswith("in the backward")


def local_counts(by_all: bool) -> DoctorReport:
    """A loss over the tokens that count, of which ranks have different numbers."""
    rank = dist.get_rank()
    counts = torch.ones(4, 5)
    counts[:2, 1:] = 0  # the first rank has two tokens that count, the second has ten
    model, whole = nn.Embedding(WORDS, DIM), nn.Embedding(WORDS, DIM)
    whole.load_state_dict(model.state_dict())
    for other in (model, whole):
        with torch.no_grad():
            other.weight.copy_(torch.randn(WORDS, DIM, generator=torch.Generator().manual_seed(0)))

    def loss(model: nn.Module, rows: slice) -> Tensor:
        return (model(tokens()[rows]).square().sum(-1) * counts[rows]).sum()

    def reference(part: int = 0, parts: int = 1) -> nn.Module:
        rows = slice(4 * part // parts, 4 * (part + 1) // parts)
        (loss(whole, rows) / counts.sum()).backward()
        return whole

    def step() -> None:
        mine = slice(2 * rank, 2 * rank + 2)
        total = counts.sum() / 2 if by_all else counts[mine].sum()
        (loss(model, mine) / total).backward()
        dist.all_reduce(model.weight.grad)
        model.weight.grad /= 2  # type: ignore[operator]

    return examined(model, reference, step, parts=2)


def test_a_loss_that_each_rank_divides_by_its_own_tokens_is_named(ranks: Ranks) -> None:
    """As of a per-token loss, of multi-token prediction, normalised by local counts."""
    assert ranks(2, local_counts, True)[0].ok
    (found,) = explanations(ranks(2, local_counts, False), "weight")
    assert found.mistake is Mistake.UNEQUAL
    assert "the parts of the batch weigh 3, 0.6 in place of 1 each" in found.text


def auxiliary(doubled: bool) -> DoctorReport:
    """A router's own loss, scaled by a count of tokens that a sum over tp has made that of all ranks."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    rows = torch.randn(8, DIM, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model, whole = nn.Linear(DIM, 4), nn.Linear(DIM, 4)
    whole.load_state_dict(model.state_dict())

    def loss(model: nn.Module, rows: Tensor, count: float) -> Tensor:
        return model(rows).softmax(-1).square().sum() * count / 64

    def reference() -> nn.Module:
        loss(whole, rows, 8).backward()
        return whole

    def step() -> None:
        mine = rows.chunk(2)[dist.get_rank()]
        count = torch.tensor(float(len(mine)))
        if doubled:
            dist.all_reduce(count)
        (2 * loss(model, mine, float(count))).backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)

    return examined(model, reference, step, mesh=mesh)


def test_a_count_that_was_summed_in_place_doubles_a_routers_gradient(ranks: Ranks) -> None:
    assert ranks(2, auxiliary, False)[0].ok
    reports = ranks(2, auxiliary, True)
    (found,) = explanations(reports, "weight")
    assert found.mistake is Mistake.SCALED and found.factor == pytest.approx(2)
    assert found.axes == ("tp",)
    assert reports[0].cause is not None and "the loss is normalised otherwise" in str(reports[0])
