"""What the doctor's page costs at 100 million parameters on 4 ranks: seconds, CPU seconds, and memory.

    PYTHONPATH=. python benchmarks/doctor_size.py   # writes benchmarks/DATE-doctor-size.md

A rank's peak is the largest resident memory between entering the doctor and its page, less that before. Of
the first rank's, weights, gradients and their copies of the reference in one process are shown apart.
"""

from __future__ import annotations

import argparse
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
    """What a rank says of its part, in seconds and bytes."""

    ok: bool
    wall: float
    cpu: float
    peak: int
    shard: int
    parameters: int
    page: int


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) << 10


def body(layers: int) -> Cost:
    """On every rank: one step under the doctor's eyes."""
    torch.set_num_threads(1)
    rank, model = dist.get_rank(), _Model(layers)
    parameters = sum(p.numel() for p in model.parameters())
    for module in [*model.layers, model]:
        fully_shard(module)
    whole = _Model(layers) if rank == 0 else None
    tokens = torch.randint(_WORDS, (2 * _RANKS, 16), generator=torch.Generator().manual_seed(1))

    def reference() -> nn.Module:
        assert whole is not None
        whole(tokens).square().mean().backward()
        return whole

    def step() -> None:
        model(tokens.chunk(_RANKS)[rank]).square().mean().backward()

    step()  # what a step itself needs is not the doctor's
    model.zero_grad()
    shard = sum(p.to_local().nbytes for p in model.parameters())  # type: ignore[attr-defined]
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before, began, cpu = _resident("VmRSS"), time.perf_counter(), time.process_time()
    with distnorm.doctor(model, reference=reference) as examination:
        step()
    assert examination.report is not None
    page = examination.report.to_html()
    took, used = time.perf_counter() - began, time.process_time() - cpu
    return Cost(examination.report.ok, took, used, _resident("VmHWM") - before, shard, parameters, len(page))


def _report(costs: list[Cost], load: float) -> str:
    first, mega = costs[0], 1e6
    lines = [
        f"# The doctor at {first.parameters / mega:.0f} million parameters, {time.strftime('%Y-%m-%d')}",
        "",
        f"`PYTHONPATH=. python benchmarks/doctor_size.py` on {platform.machine()}, {os.cpu_count()} CPUs "
        f"shared with other work (load {load:.0f} before), torch {torch.__version__}, gloo, FSDP2 on "
        f"{_RANKS} ranks, float32. {'Every gradient was right.' if first.ok else 'Something was wrong.'}",
        "",
        "| rank | seconds | CPU seconds | shard, MB | peak beyond what was there, MB | in shards |",
        "|---|---|---|---|---|---|",
    ]
    for rank, cost in enumerate(costs):
        memory = f"{cost.shard / mega:.0f} | {cost.peak / mega:.0f} | {cost.peak / cost.shard:.2f}"
        lines.append(f"| {rank} | {cost.wall:.1f} | {cost.cpu:.1f} | {memory} |")
    cpu = sum(cost.cpu for cost in costs)
    lines += ["", f"The page has {first.page / 1e3:.0f} kB. CPU seconds of all ranks: {cpu:.1f}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, print and write the report."""
    from distnorm.testing import RankPool, preload

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=16, help="of 4.2 million parameters each")
    parser.add_argument("--print", action="store_true", dest="only_print", help="write no file")
    options = parser.parse_args()
    preload("benchmarks.doctor_size")
    load = os.getloadavg()[0]
    costs: list[Cost] = RankPool(max_ranks=_RANKS).run(_RANKS, body, options.layers, timeout=1500.0)
    text = _report(costs, load)
    print(text)
    if not options.only_print:
        path = Path(__file__).with_name(f"{time.strftime('%Y-%m-%d')}-doctor-size.md")
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
