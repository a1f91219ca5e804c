"""What the doctor's page costs at 100 million parameters on 4 ranks: seconds, CPU seconds, and memory.

    PYTHONPATH=. python benchmarks/doctor_size.py            # writes benchmarks/DATE-doctor-size.md
    PYTHONPATH=. python benchmarks/doctor_size.py --spoilt   # with wrong gradients; printed

Peaks are of resident memory. The doctor has three parts: it runs the reference before the step, watches the
step, and compares after it. Of each the peak is given, less what was resident before the doctor; of the step
less what the same step takes without the doctor, measured first, and of the comparison less what the same
step leaves, its gradients, without the doctor. The first rank runs the reference: what a
run of that takes by itself, gradients and all, is measured before too, in the same process, and given beside.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import distnorm

_RANKS, _DIM, _WORDS = 4, 1024, 32768


class _Model(nn.Module):
    """An embedding, residual layers of two matrices, and a norm."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tok = nn.Embedding(_WORDS, _DIM)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(_DIM), nn.Linear(_DIM, 2 * _DIM), nn.GELU(), nn.Linear(2 * _DIM, _DIM))
            for _ in range(layers)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return x


@dataclass(frozen=True)
class Cost:
    """What a rank says of its part, in seconds and bytes: peaks before, in and after the step."""

    ok: bool
    cause: str
    wall: float
    cpu: float
    peaks: tuple[int, int, int]
    step: int
    reference: int
    shard: int
    parameters: int
    page: int


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) << 10


class _Peak:
    """Peaks of resident memory beyond what was there when this was made, each since the one before.

    What the C library has kept of freed memory is given back first: it would be used again, unseen.
    """

    def __init__(self) -> None:
        self.before = 0
        self.before = self.kept()

    def kept(self) -> int:
        """What is held now, and no more; another peak begins."""
        ctypes.CDLL(None).malloc_trim(0)
        self.next()
        return _resident("VmRSS") - self.before

    def next(self) -> int:
        """The peak since the last call; another one begins."""
        found = _resident("VmHWM") - self.before
        Path("/proc/self/clear_refs").write_text("5")
        return found


def body(layers: int, is_spoilt: bool) -> Cost:
    """On every rank: one step under the doctor's eyes."""
    torch.set_num_threads(1)
    rank, model = dist.get_rank(), _Model(layers)
    parameters = sum(p.numel() for p in model.parameters())
    for module in [*model.layers, model]:
        fully_shard(module)
    whole = _Model(layers) if rank == 0 else None
    tokens = torch.randint(_WORDS, (2 * _RANKS, 16), generator=torch.Generator().manual_seed(1))

    def reference(part: int = 0, parts: int = 1) -> nn.Module:
        assert whole is not None
        (whole(tokens.chunk(parts)[part]).square().mean() / parts).backward()
        return whole

    def step() -> None:
        model(tokens.chunk(_RANKS)[rank]).square().mean().backward()

    step()  # what a first step loads is nobody's
    model.zero_grad()
    peak = _Peak()
    step()
    of_step, kept = peak.next(), peak.kept()
    model.zero_grad()
    peak = _Peak()
    if whole is not None:
        reference().zero_grad()
    of_reference = peak.next()
    shard = sum(p.to_local().nbytes for p in model.parameters())  # type: ignore[attr-defined]
    dist.barrier()
    began, cpu, peak = time.perf_counter(), time.process_time(), _Peak()
    with distnorm.doctor(model, reference=reference, parts=_RANKS) as examination:
        before = peak.next()
        step()
        if is_spoilt:
            for parameter in model.parameters():
                parameter.grad.mul_(1.5 if parameter.ndim > 1 else 1)  # type: ignore[union-attr]
        within = peak.next()
        peak.kept()
    after, report = peak.next(), examination.report
    assert report is not None
    page = report.to_html()
    took, used = time.perf_counter() - began, time.process_time() - cpu
    cause = "" if report.cause is None else report.cause.explanation.text
    peaks = (before, within, after - kept)
    return Cost(report.ok, cause, took, used, peaks, of_step, of_reference, shard, parameters, len(page))


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
        "Megabytes of resident memory at the peak of each part, beyond what was there before the doctor. The "
        "doctor's own are those of the step less what the step takes without it, on rank 0 those of the "
        "reference's runs less what one run takes by itself, and those of the comparison, of which is taken "
        "what the step leaves without the doctor. A shard is this rank's part of the weights.",
        "",
        "| rank | seconds | CPU seconds | shard | reference's runs | one run by itself | step "
        "| step by itself | comparison | the doctor's own | in shards |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for rank, cost in enumerate(costs):
        before, within, after = cost.peaks
        own = max(before - cost.reference, within - cost.step, after)
        sizes = (cost.shard, before, cost.reference, within, cost.step, after, own)
        memory = " | ".join(f"{size / mega:.0f}" for size in sizes)
        lines.append(f"| {rank} | {cost.wall:.1f} | {cost.cpu:.1f} | {memory} | {own / cost.shard:.2f} |")
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
