"""What planning costs one rank of a large world, as a table: `python benchmarks/planning.py`.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/planning.py [--ranks 64 16384] [--json CASE RANKS]

Every row is a process of its own, and is the rank on which most rows meet. See `simulated_rank.py` for what
of the world is computed. Time is the median of several plans, on one core and by the wall's clock, without
the simulation's own; memory is how far the resident set rises above what it was before the first plan.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import subprocess
import sys
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.simulated_rank import (
    Piece,
    agree,
    clocks,
    most_loaded_rank,
    owned_names,
    piece,
    plan,
    simulated,
)
from distnorm.errors import ReplicaError
from distnorm.plan.collectives import Ranks
from distnorm.plan.plan import raise_named

SHARDS = 1000
RANKS = (64, 256, 1024, 4096, 16384)
REPEATS = 7


@dataclass
class Mesh:
    """A world of pipeline stages x replicas x shards x tensor parallel, with experts on part of the shards.

    Args:
        size: ranks.
        pp, shard, tp, ep: sizes of these axes; those that are left replicate. `ep` divides `shard`.
        norms, experts: how many of a rank's parameters are norms (whole over tp), and experts.
    """

    size: int
    pp: int = 1
    shard: int = 1
    tp: int = 1
    ep: int = 1
    norms: int = 0
    experts: int = 0
    shards: int = SHARDS
    _held: dict[str, tuple[str, int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for stage in range(self.pp):
            for i in range(self.shards):
                kind = "norm" if i < self.norms else "expert" if i < self.norms + self.experts else "dense"
                for expert in range(self.ep if kind == "expert" else 1):
                    self._held[f"stages.{stage}.layers.{i}.{kind}.{expert}.weight"] = kind, stage, expert
        self.names = list(self._held)

    def kind(self, name: str) -> Hashable:
        return self._held[name]

    def pieces(self, rank: int, name: str) -> list[Piece]:
        kind, stage, expert = self._held[name]
        rest, tp = divmod(rank, self.tp)
        rest, shard = divmod(rest, self.shard)
        parts, tp_parts = self.shard, self.tp
        if stage != rest // (self.size // (self.pp * self.shard * self.tp)):
            return []
        if kind == "expert":
            if shard % self.ep != expert:
                return []
            shard, parts = shard // self.ep, self.shard // self.ep
        if kind == "norm":
            tp, tp_parts = 0, 1
        extents = ((2 * shard, 2 * shard + 2), (4 * tp, 4 * tp + 4))
        return [piece(name, extents, (2 * parts, 4 * tp_parts))]


CASES = {
    "FSDP": lambda size: Mesh(size, shard=size),
    "DDP": lambda size: Mesh(size),
    "HSDP": lambda size: Mesh(size, shard=min(size // 2, 512)),
    "HSDP x TP 8": lambda size: Mesh(size, shard=min(size // 16, 128), tp=8, norms=250),
    "PP 4 x HSDP x TP 8": lambda size: Mesh(size, pp=4, shard=min(size // 64 or 1, 64), tp=8, norms=250),
    "FSDP x EP 8 (MoE)": lambda size: Mesh(size, shard=size, ep=8, norms=100, experts=800),
}


def resident(key: str) -> int:
    """Bytes of this process's memory: `VmRSS` now, `VmHWM` at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def quiet() -> int:
    """Let the high-water mark start anew, and say from where."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def measured(case: str, size: int, shards: int = SHARDS) -> dict[str, float]:
    """Time and memory of the most loaded rank."""
    topology = CASES[case](size)
    rank = most_loaded_rank(topology)
    with simulated(rank, topology) as group:
        assert len(group.mine) == shards
        before = quiet()
        plans, agreements = [], []
        for repeat in range(REPEATS):
            began = clocks()
            planned = plan(group)
            plans.append(clocks() - began - group.seconds)
            sent, received, peers = group.sent, group.received, len(group.peers)
            if not repeat:
                memory = resident("VmHWM") - before
            spent, began = group.seconds.clone(), clocks()
            agree(group, planned)
            agreements.append(clocks() - began - (group.seconds - spent))
        both = resident("VmHWM") - before
    (wall, cpu), (_, agree_cpu) = (1e3 * torch.stack(times).median(0).values for times in (plans, agreements))
    return {
        "rank": rank,
        "names": len(owned_names(topology, rank)),
        "rows": len(group.met.plan),
        "peers": peers,
        "plan_ms": float(cpu),
        "plan_wall_ms": float(wall),
        "plan_mb": memory / 1e6,
        "agree_ms": float(agree_cpu),
        "both_mb": both / 1e6,
        "sent": sent,
        "received": received,
    }


def refused(size: int) -> dict[str, float]:
    """Time and memory of one rank when all refuse three parameters."""
    with simulated(0, Mesh(size, shards=1)):
        before, began = quiet(), clocks()
        try:
            raise_named(Ranks(), [(f"{i}.{'name' * 75}", "x" * 300) for i in range(3)], ReplicaError, "", "")
        except ReplicaError as error:
            (wall, _), message = 1e3 * (clocks() - began), str(error)
        return {"wall_ms": float(wall), "mb": (resident("VmHWM") - before) / 1e6, "characters": len(message)}


def in_a_process(case: str, size: int) -> dict[str, float]:
    """`measured`, in a process that has done nothing else."""
    command = [sys.executable, __file__, "--json", case, str(size)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--json", nargs=2, metavar=("CASE", "RANKS"), help="one case, here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.json:
        case, size = arguments.json
        print(json.dumps(refused(int(size)) if case == "refused" else measured(case, int(size))))
        return
    print(f"python {platform.python_version()}, torch {torch.__version__}, {SHARDS} shards a rank\n")
    print(
        "| case | ranks | peers | names | rows met | sent kB | received kB | plan ms | wall ms | plan MB | ",
        end="",
    )
    print("agreement ms | both MB |\n|---|---|---|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        for size in arguments.ranks:
            row = in_a_process(case, size)
            cells = [
                case,
                size,
                row["peers"],
                row["names"],
                row["rows"],
                *(f"{row[k] / 1e3:.0f}" for k in ("sent", "received")),
            ]
            cells += [f"{row[key]:.0f}" for key in ("plan_ms", "plan_wall_ms")] + [f"{row['plan_mb']:.1f}"]
            cells += [f"{row['agree_ms']:.0f}", f"{row['both_mb']:.1f}"]
            print("|", " | ".join(map(str, cells)), "|", flush=True)
    for size in arguments.ranks:
        row = in_a_process("refused", size)
        print(f"all of {size} ranks refuse: {row['wall_ms']:.0f} ms wall, {row['mb']:.1f} MB, ", end="")
        print(f"an error of {row['characters']} characters")


if __name__ == "__main__":
    main()
