"""What `benchmarks/restarts.py` runs and reads: the trainer with a tiny model, its rows and checkpoints."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.forked import Ranks, command, start
from distnorm.trainer.rundir import newest_checkpoint

ROOT = Path(__file__).parent.parent
STEPS, EVERY, TIMEOUT, ANSWER = 24, 2, 30, 8  # steps, steps, seconds, seconds
TOLERANCE = 1e-6
# Number of ranks and how they share the work: every number of ranks has several.
TOPOLOGIES = {
    "1": "{backend: fsdp2, dp_replicate: 1, dp_shard: 1, tp: 1, pp: 1}",
    "2, DDP": "{backend: ddp, dp_replicate: 2, dp_shard: 1, tp: 1, pp: 1}",
    "2, FSDP2": "{backend: fsdp2, dp_replicate: 1, dp_shard: 2, tp: 1, pp: 1}",
    "2, TP": "{backend: fsdp2, dp_replicate: 1, dp_shard: 1, tp: 2, pp: 1}",
    "3, FSDP2": "{backend: fsdp2, dp_replicate: 1, dp_shard: 3, tp: 1, pp: 1}",
    "4, FSDP2 x TP": "{backend: fsdp2, dp_replicate: 1, dp_shard: 2, tp: 2, pp: 1}",
}
KEYS = ("loss", "grad_norm", "clip_coef", "threshold")


@dataclass
class Tally:
    """What was seen.

    Args:
        kills: by what the run was doing: "start", "step" or "save".
        starts: of ranks together.
        slowest: seconds that a rank took at most to end by itself after another was killed.
        starved: seconds of these in which it waited for a core.
        awake: seconds that a rank took at most, but for those in which it waited for a core.
        unnamed: ranks that ended in a traceback, in place of a line that says who was lost.
        wrong: what must not be.
        runs: that were brought to their end, and compared.
        agents: runs of torchrun among them.
        typical: seconds that the newest run took which nobody killed.
    """

    kills: Counter[str] = field(default_factory=Counter)
    topologies: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    slowest: float = 0.0
    starved: float = 0.0
    awake: float = 0.0
    unnamed: int = 0
    alone: int = 0
    largest: float = 0.0
    wrong: list[str] = field(default_factory=list)
    runs: int = 0
    agents: int = 0
    typical: float = 2.0


def arguments(topology: str, folder: Path, *more: str) -> list[str]:
    """What `distnorm` is given."""
    keys = [
        *("clip.max_norm=0.25", f"train.steps={STEPS}", "train.device=cpu", "train.dtype=float64"),
        *(f"train.timeout={TIMEOUT}", f"train.checkpoint.every={EVERY}", f"train.output_dir={folder}"),
        *("train.model={dim: 16, layers: 2, heads: 2, context: 8}", "train.data.batch_size=12"),
        *(f"train.data.path={ROOT / 'tests' / 'trainer' / 'numbers.txt'}", "clip.policy={name: zclip}"),
        *(f"train.parallel={TOPOLOGIES[topology]}", *more),
    ]
    config = str(ROOT / "configs" / "quickstart.yaml")
    return ["train", config, "--resume", *(word for key in keys for word in ("--set", key))]


def launch(topology: str, folder: Path, out: Path, *more: str) -> Ranks:
    words = arguments(topology, folder, *more)
    return start(int(topology[0]), lambda rank: command(*words), out)


def rows(folder: Path) -> dict[int, dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    return {row["step"]: row for row in found}


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, which torch can read; 0 without one."""
    path = newest_checkpoint(folder)
    if path is None:
        return 0
    torch.load(path / "trainer.pt", weights_only=True)
    return int(path.name.removeprefix("step-"))


def doing(folder: Path) -> str:
    """What a run does at the moment, by its files."""
    if any((folder / "checkpoints").glob("*.partial")):
        return "save"
    lines = (folder / "metrics.jsonl").stat().st_size if (folder / "metrics.jsonl").exists() else 0
    return "step" if lines else "start"


def by_torchrun(place: Path, expected: dict[int, dict[str, Any]], tally: Tally, dice: random.Random) -> None:
    """Kill ranks of torchrun, whose agent starts all of them again."""
    topology, folder = "2, FSDP2", place / "torchrun"
    environ = {**os.environ, "PYTHON": sys.executable, "NPROC_PER_NODE": "2", "MAX_RESTARTS": "4"}
    run = subprocess.Popen(
        [str(ROOT / "launch" / "torchrun.sh"), *arguments(topology, folder)],
        env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(3):
        time.sleep(dice.uniform(0.5, 2.0))
        until = time.monotonic() + 600
        while not (victims := _workers(run.pid)) and run.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        if victims:
            tally.kills[doing(folder)] += 1
            os.kill(dice.choice(victims), signal.SIGKILL)
    said = run.communicate(timeout=1200)[1]
    tally.starts += 1
    if run.returncode:
        tally.wrong.append(f"torchrun ended with {run.returncode}: {said[-300:]}")
    same = all(
        math.isclose(rows(folder)[s][k], expected[s][k], rel_tol=TOLERANCE)
        for s in expected
        for k in KEYS[:3]
    )
    tally.runs += 1
    tally.agents += 1
    if not same:
        tally.wrong.append("torchrun: other rows")


def _workers(agent: int) -> Sequence[int]:
    children = Path(f"/proc/{agent}/task/{agent}/children")
    return [int(word) for word in children.read_text().split()] if children.exists() else []
