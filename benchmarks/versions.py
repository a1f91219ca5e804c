"""Two versions of distnorm in one process, in turns: this checkout's and another one's.

    git worktree add ../old COMMIT
    torchrun --nproc-per-node 4 benchmarks/versions.py ../old many moe ddp fsdp --rounds 15

The other version is copied under another name, so that both can be imported.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distnorm.bench import run, workloads
from distnorm.bench.contenders import EXACT, Contender
from distnorm.bench.problem import Problem

OTHER = "distnorm_other"


def copy_under_another_name(checkout: Path, folder: Path) -> None:
    """Copy the package, with every mention of its name changed."""
    package = checkout / "distnorm"
    for source in package.rglob("*"):
        if source.suffix not in (".py", ".c", ".cpp"):
            continue
        target = folder / OTHER / source.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text(encoding="utf-8")
        if source.suffix == ".py":
            text = re.sub(r"\bdistnorm\b", OTHER, text)
        target.write_text(text, encoding="utf-8")


def beside(contenders: Callable[..., list[Contender]], other: Any) -> Callable[..., list[Contender]]:
    """What gives a workload's contenders, with those of the other version."""

    def both(problem: Problem, *rest: Any) -> list[Contender]:
        found = contenders(problem, *rest)
        max_norm = rest[0] if isinstance(rest[0], float) else None
        tied = [tuple(names) for names in problem.tied]
        clipper = other.GradClipper(problem.target, {"clip": {"max_norm": max_norm}}, tied=tied)
        if max_norm is None:
            return [*found, Contender("other GradClipper", lambda: clipper.measure().total_norm, EXACT)]

        def function() -> Any:
            return other.clip_grad_norm_(problem.target, max_norm, tied=tied)

        return [
            *found,
            Contender("other GradClipper", lambda: clipper.clip().total_norm, EXACT),
            Contender("other clip_grad_norm_", function, EXACT),
        ]

    return both


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("workloads", nargs="+")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    os.environ.setdefault("DISTNORM_NATIVE", "now")
    with tempfile.TemporaryDirectory() as folder:
        copy_under_another_name(arguments.checkout, Path(folder))
        sys.path.insert(0, folder)
        other = importlib.import_module(OTHER)
        workloads.clippers = beside(workloads.clippers, other)
        workloads.measurers = beside(workloads.measurers, other)
        return run.main(arguments.workloads, rounds=arguments.rounds, json_file=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
