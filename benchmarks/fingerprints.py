"""Fingerprints of gradients: is every flipped bit found, on the right rank, and is there ever a false alarm?

    PYTHONPATH=. python benchmarks/fingerprints.py   # writes benchmarks/DATE-fingerprints.md

Two ranks train a small model sharded by FSDP2, so nobody has a replica of anything. In each dtype each bit of
one element of one rank's gradient is flipped in turn as the step is computed again. Then steps are computed
twice with nothing flipped. What it costs is measured by `distnorm bench fingerprints`.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import distnorm

_INTS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64}
_RANK, _NAME = 1, "2.weight"


class _Run:
    """One model on two ranks, its clipper and its optimizer."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(16, 32, dtype=dtype), nn.Tanh(), nn.Linear(32, 16, dtype=dtype)]
        self.model = nn.Sequential(*layers)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        settings = {"clip": {"max_norm": 0.5, "nonfinite": "skip"}, "monitor": {"fingerprints": 4}}
        self.clipper = distnorm.GradClipper(self.model, settings)
        self.dtype = dtype

    def compute(self, step: int, bit: int | None = None) -> None:
        """Fill the gradients of a step, with one bit flipped on one rank, or none."""
        dice = torch.Generator().manual_seed(2 * step + dist.get_rank())
        self.optimizer.zero_grad()
        rows = torch.randn(8, 16, generator=dice).to(self.dtype)
        self.model(rows).square().mean().backward()
        if bit is not None and dist.get_rank() == _RANK:
            gradient = dict(self.model.named_parameters())[_NAME].grad
            _flip(gradient.to_local(), bit)  # type: ignore[union-attr]


def _flip(tensor: Tensor, bit: int) -> None:
    size = 8 * tensor.dtype.itemsize
    tensor.view(_INTS[tensor.dtype])[3, 5] ^= (1 << bit) if bit < size - 1 else -(1 << bit)


def flips(dtype: torch.dtype) -> tuple[int, int]:
    """On every rank: how many bits an element has, and of how many flips rank and parameter were named."""
    run, named = _Run(dtype), 0
    bits = 8 * dtype.itemsize
    for bit in range(bits):
        run.compute(bit)
        run.clipper.clip()
        found = distnorm.replay(run.clipper, lambda step=bit: run.compute(step, bit=step))  # type: ignore[misc]
        named += found == [(_RANK, _NAME)]
    return bits, named


def clean(dtype: torch.dtype, steps: int) -> int:
    """On every rank: in how many of so many steps, all computed twice, something differed."""
    run, alarms = _Run(dtype), 0
    for step in range(steps):
        run.compute(step)
        run.clipper.clip()
        alarms += bool(distnorm.replay(run.clipper, lambda step=step: run.compute(step)))  # type: ignore[misc]
        run.clipper.clip()
        run.optimizer.step()
    return alarms


def main() -> None:
    """Run, print and write the report."""
    from distnorm.testing import RankPool, preload

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="clean steps, over the three dtypes together")
    parser.add_argument("--print", action="store_true", dest="only_print", help="write no file")
    options = parser.parse_args()
    preload("benchmarks.fingerprints")
    ranks = RankPool(max_ranks=2).run
    lines = [
        f"# Fingerprints, {time.strftime('%Y-%m-%d')}",
        "",
        f"`PYTHONPATH=. python benchmarks/fingerprints.py` on {platform.machine()}, torch "
        f"{torch.__version__}, gloo; 2 ranks, FSDP2. Bits of an element of '{_NAME}' are flipped on rank 1.",
        "",
        "| dtype | bits flipped | rank and parameter named | clean steps | alarms |",
        "|---|---|---|---|---|",
    ]
    shares = [options.steps // 3 + (i < options.steps % 3) for i in range(3)]
    for dtype, steps in zip(_INTS, shares, strict=True):
        (bits, named), _ = ranks(2, flips, dtype, timeout=600.0)
        alarms = max(ranks(2, clean, dtype, steps, timeout=1500.0))
        lines.append(f"| {str(dtype).removeprefix('torch.')} | {bits} | {named} | {steps} | {alarms} |")
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if not options.only_print:
        path = Path(__file__).with_name(f"{time.strftime('%Y-%m-%d')}-fingerprints.md")
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
