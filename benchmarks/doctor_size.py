"""What the doctor's page costs at 100 million parameters on 4 ranks: seconds, CPU seconds, and memory.

    PYTHONPATH=. python benchmarks/doctor_size.py            # writes benchmarks/DATE-doctor-size.md
    PYTHONPATH=. python benchmarks/doctor_size.py --spoilt   # with wrong gradients; printed

The doctor runs the reference before the step, watches that, compares after it, and explains what is wrong,
for which it runs the reference over parts of the batch. Of each the peak is given, less what was there before
the doctor. Of the step what the same step takes without the doctor, measured first, is taken too; of all that
comes after it what the step leaves, its gradients; and on the first rank, of the reference's runs, what one
takes by itself, gradients and all. All is measured twice: what is held, counted after every operator, and
resident memory, which has what the C library keeps of freed memory in it too.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import distnorm
from benchmarks.held import HeldPeak, held_bytes
from distnorm.verification.doctor.preparing import Prepared

_RANKS, _DIM, _WORDS = 4, 1024, 32768


class _Model(nn.Module):
    """An embedding, residual layers of two matrices, and a norm."""

    def __init__(self, layers: int, dim: int, words: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tok = nn.Embedding(words, dim)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            for _ in range(layers)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return x


@dataclass(frozen=True)
class Bytes:
    """One of two measures: what is held, and what is resident."""

    held: int
    resident: int

    def __sub__(self, other: Bytes) -> Bytes:
        return Bytes(self.held - other.held, self.resident - other.resident)


@dataclass(frozen=True)
class Cost:
    """What a rank says of its part, in seconds and bytes: the doctor's own by its parts."""

    ok: bool
    cause: str
    wall: float
    cpu: float
    own: dict[str, Bytes]
    shard: int
    parameters: int
    page: int

    def most(self, what: str, but: str = "") -> int:
        """The most that is the doctor's own in any of its parts but one, ``"held"`` or ``"resident"``."""
        return max(int(getattr(each, what)) for name, each in self.own.items() if name != but)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) << 10


class _Peak:
    """Peaks of memory beyond what was there when this was made, each since the one before.

    What the C library has kept of freed memory is given back first: it would be used again, unseen.
    """

    def __init__(self, counter: HeldPeak) -> None:
        self._counter, self._before = counter, Bytes(0, 0)
        self._before = self.kept()

    def kept(self) -> Bytes:
        """What is there now, and no more; another peak begins."""
        gc.collect()  # models of an earlier run, in cycles, would go at any time
        ctypes.CDLL(None).malloc_trim(0)
        self.next()
        return Bytes(held_bytes(), _resident("VmRSS")) - self._before

    def next(self) -> Bytes:
        """The peak since the last call; another one begins."""
        found = Bytes(self._counter.next(), _resident("VmHWM")) - self._before
        Path("/proc/self/clear_refs").write_text("5")
        return found


def body(layers: int, is_spoilt: bool, dim: int = _DIM, words: int = _WORDS) -> Cost:
    """On every rank: one step under the doctor's eyes."""
    torch.set_num_threads(1)
    rank, size, model = dist.get_rank(), dist.get_world_size(), _Model(layers, dim, words)
    for module in [*model.layers, model]:
        fully_shard(module)
    whole = _Model(layers, dim, words) if rank == 0 else None
    tokens = torch.randint(words, (2 * size, 16), generator=torch.Generator().manual_seed(1))

    def reference(part: int = 0, parts: int = 1) -> nn.Module:
        assert whole is not None
        (whole(tokens.chunk(parts)[part]).square().mean() / parts).backward()
        return whole

    def step() -> None:
        model(tokens.chunk(size)[rank]).square().mean().backward()

    with HeldPeak() as counter:
        return _measured(counter, model, reference if whole is not None else None, step, is_spoilt)


def _measured(
    counter: HeldPeak,
    model: nn.Module,
    reference: Callable[..., nn.Module] | None,
    step: Callable[[], None],
    is_spoilt: bool,
) -> Cost:
    step()  # what a first step loads is nobody's
    model.zero_grad()
    peak = _Peak(counter)
    step()
    of_step, kept = peak.next(), peak.kept()
    model.zero_grad()
    peak = _Peak(counter)
    if reference is not None:
        reference().zero_grad()
    of_run = peak.next()
    dist.barrier()
    began, cpu, peak = time.perf_counter(), time.process_time(), _Peak(counter)
    own: dict[str, Bytes] = {}
    with (
        _parts_apart(own, peak, kept, of_run),
        distnorm.doctor(model, reference=reference or _nothing, parts=dist.get_world_size()) as examination,
    ):
        own["reference"] = peak.next() - of_run
        step()
        if is_spoilt:
            for parameter in model.parameters():
                parameter.grad.mul_(1.5 if parameter.ndim > 1 else 1)  # type: ignore[union-attr]
        own["step"] = peak.next() - of_step
        own["after the step"] = peak.kept() - kept
    own["explaining" if "comparing" in own else "comparing"] = peak.next() - kept
    report = examination.report
    assert report is not None
    page = report.to_html()
    took, used = time.perf_counter() - began, time.process_time() - cpu
    cause = "" if report.cause is None else report.cause.explanation.text
    shard = sum(p.to_local().nbytes for p in model.parameters())  # type: ignore[attr-defined]
    count = sum(p.numel() for p in model.parameters())
    return Cost(report.ok, cause, took, used, own, shard, count, len(page))


@contextmanager
def _parts_apart(own: dict[str, Bytes], peak: _Peak, kept: Bytes, of_run: Bytes) -> Iterator[None]:
    """Measure the reference's runs over parts of the batch apart from the comparison before them."""
    original = Prepared.run_parts

    def run_parts(*args: Any) -> None:
        own["comparing"] = peak.next() - kept
        original(*args)
        own["parts"] = peak.next() - kept - of_run

    Prepared.run_parts = run_parts  # type: ignore[method-assign]
    try:
        yield
    finally:
        Prepared.run_parts = original  # type: ignore[method-assign]


def _nothing(part: int = 0, parts: int = 1) -> nn.Module:
    raise AssertionError("the reference runs on the first rank only")


def _report(costs: list[Cost], load: float) -> str:
    first, mega = costs[0], 1e6
    said = "Every gradient was right." if first.ok else f"The cause was said to be: {first.cause}."
    lines = [
        f"# The doctor at {first.parameters / mega:.0f} million parameters, {time.strftime('%Y-%m-%d')}",
        "",
        f"`PYTHONPATH=. python benchmarks/doctor_size.py` on {platform.machine()}, {os.cpu_count()} CPUs "
        f"shared with other work (load {load:.0f} before), torch {torch.__version__}, gloo, FSDP2 on "
        f"{_RANKS} ranks, float32. {said}",
        "",
        "Megabytes of the doctor's own at the peak of each of its parts: beyond what was there before, and "
        "what the step, and on rank 0 a run of the reference, take without it. A shard is a rank's part of "
        "the weights.",
    ]
    for what, title in (("held", "Held, counted after every operator"), ("resident", "Resident")):
        names = list(first.own)
        lines += [
            "",
            f"{title}:",
            "",
            f"| rank | seconds | CPU seconds | {' | '.join(names)} | most, in shards |",
        ]
        lines.append("|---" * (len(names) + 4) + "|")
        for rank, cost in enumerate(costs):
            sizes = " | ".join(f"{getattr(cost.own[name], what) / mega:.1f}" for name in names)
            share = cost.most(what) / cost.shard
            lines.append(f"| {rank} | {cost.wall:.1f} | {cost.cpu:.1f} | {sizes} | {share:.2f} |")
    lines += ["", f"A shard has {first.shard / mega:.1f} MB."]
    cpu = sum(cost.cpu for cost in costs)
    lines += ["", f"The page has {first.page / 1e3:.0f} kB. CPU seconds of all ranks: {cpu:.1f}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, print and write the report."""
    from distnorm.testing import RankPool, preload

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=16, help="of 4.2 million parameters each")
    parser.add_argument("--spoilt", action="store_true", help="scale the gradients of matrices")
    parser.add_argument("--print", action="store_true", dest="only_print", help="write no file")
    options = parser.parse_args()
    preload("benchmarks.doctor_size")
    load = os.getloadavg()[0]
    costs: list[Cost] = RankPool(max_ranks=_RANKS).run(
        _RANKS, body, options.layers, options.spoilt, timeout=1500.0
    )
    text = _report(costs, load)
    print(text)
    if not (options.only_print or options.spoilt):
        path = Path(__file__).with_name(f"{time.strftime('%Y-%m-%d')}-doctor-size.md")
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
