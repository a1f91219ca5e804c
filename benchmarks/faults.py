"""Make each fault of a cluster, and write what every rank said of it, and after how long: docs/faults.md.

    PYTHONPATH=. python benchmarks/faults.py               # as root, for the network and the disks
    PYTHONPATH=. python benchmarks/faults.py --only clock  # those whose name has this, printed

Ranks are processes of gloo on the CPU; the reference trainer is `distnorm train`, as torchrun runs it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path

import torch

from benchmarks.faults_made import BAD, FAULTS, ROOT, SIZE, TIMEOUT, Fault, trainer
from benchmarks.forked import Ended, start

_LIMIT = 12 * TIMEOUT  # seconds; whoever still runs then hangs
_MOST = 420  # characters of a line
_SAME = 1e-9  # relative
_LATER = 1.0  # seconds after which a rank whose neighbours have all ended is not waited for


def made(fault: Fault) -> list[str]:
    """Make a fault; a row of the table."""
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        try:
            remove = fault.prepare(folder)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            return [fault.name, fault.done, f"not made here: {reason.strip()}", ""]
        try:
            return [fault.name, fault.done, *_made(fault, folder)]
        finally:
            remove()


def _made(fault: Fault, folder: Path) -> list[str]:
    ranks = start(
        SIZE,
        lambda rank: fault.body(rank, folder),
        folder / "out",
        **{"environ": fault.environ, "address": fault.address, "enter": fault.enter},
    )

    def others_have_ended() -> bool:
        ended = [one.at for rank, one in ranks.ended.items() if rank != BAD]
        return len(ended) == SIZE - 1 and time.monotonic() > max(ended) + _LATER + 3 * TIMEOUT

    ended = ranks.finish(ranks.began + _LIMIT, others_have_ended)
    moment = folder / "moment"
    began = float(moment.read_text()) if moment.exists() else ranks.began
    return _cells(ended, began, str(folder))


def _cells(ended: dict[int, Ended], began: float, folder: str) -> list[str]:
    by_line: dict[str, list[int]] = {}
    for rank, one in ended.items():
        line = _decisive(one, folder).replace(f"rank {rank} waited", "this rank waited")
        by_line.setdefault(re.sub(r"(\[[\d.]+\]:)\d+", r"\1PORT", line), []).append(rank)
    said = [f"{_named(ranks)}: {line}" for line, ranks in by_line.items()]
    times = [
        "still there" if one.code is None else f"{max(0.0, one.at - began):.1f} s" for one in ended.values()
    ]
    return ["<br>".join(said), ", ".join(times)]


def _named(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _decisive(ended: Ended, folder: str) -> str:
    lines = [line.strip() for line in ended.said.splitlines() if line.strip()]
    signs = ("distnorm: error: ", "distnorm.errors", "what():", "sink ")
    ours = [line for line in lines if any(sign in line for sign in signs)]
    line = (ours or lines or [""])[-1]
    line = line.replace(folder, "DIR").replace(str(ROOT), ".").replace(platform.node() or "\0", "HOST")
    line = re.sub(r"\[(/|\.\.)\S+/(\w+\.cc:\d+)\]", r"[\2]", line).replace("|", "\\|").replace("<", "&lt;")
    line = line if len(line) <= _MOST else line[:_MOST] + "..."
    if ended.code is None:
        return "nothing" if not line else f"`{line}`, and then nothing"
    if ended.code < 0:
        return f"ended by {signal.Signals(-ended.code).name}" + (f", having said `{line}`" if line else "")
    return f"`{line}` (exit code {ended.code})" if line else f"exit code {ended.code}"


def restarted() -> list[str]:
    """Kill all ranks of a run, and start it again."""
    every, name = "train.checkpoint.every=2", "train.output_dir="
    sets = ("train.steps=40", "train.dtype=float64")
    with tempfile.TemporaryDirectory(prefix="faults-") as there:
        folder = Path(there)
        rows = folder / "run" / "metrics.jsonl"
        body = trainer(every, f"{name}{folder / 'run'}", *sets)
        first = start(SIZE, lambda rank: body(rank, folder), folder / "out")
        while not (rows.exists() and rows.read_text().count("\n") >= 7) and not first.ended:
            first.look()
            time.sleep(0.005)
        for rank in range(SIZE):
            first.kill(rank)
        first.finish(time.monotonic() + TIMEOUT)
        whole = trainer(f"{name}{folder / 'whole'}", *sets)
        begun = time.monotonic()
        ended = start(SIZE, lambda rank: body(rank, folder), folder / "again").finish(begun + _LIMIT)
        start(SIZE, lambda rank: whole(rank, folder), folder / "whole-out").finish(time.monotonic() + _LIMIT)
        kept, other = _numbers(rows), _numbers(folder / "whole" / "metrics.jsonl")
        alike = len(kept) == len(other) and all(map(partial(math.isclose, rel_tol=_SAME), kept, other))
        same = f"the rows are an undisturbed run's within {_SAME:g}" if alike else "OTHER ROWS"
        line = next((line for line in ended[0].said.splitlines() if "going on after" in line), "")
        cells = _cells(ended, begun, str(folder))
        line = line[line.index("going on") :] if "going on" in line else "it began anew"
        return ["restart", "`kill -9` of all ranks, then `--resume`", f"rank 0: `{line}`; {same}", cells[1]]


def _numbers(path: Path) -> list[float]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [
        float(json.loads(line)[key]) for line in lines for key in ("step", "loss", "grad_norm", "clip_coef")
    ]


_PAGE = ROOT / "docs" / "faults.md"
_TABLE = "| fault | what was done | what the ranks said | after |\n|---|---|---|---|\n"


def _write(rows: Sequence[Sequence[str]]) -> None:
    """Put the table between the page's marks, which stay."""
    text = _PAGE.read_text()
    before, _, rest = text.partition("<!-- faults -->\n")
    _, _, after = rest.partition("<!-- end of faults -->")
    versions = f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"
    by = "root" if not os.getuid() else "a user who isn't root"
    made = f"Made by `benchmarks/faults.py` on {date.today()} with {versions}, as {by}.\n\n"
    table = _TABLE + "".join(f"| {' | '.join(row)} |\n" for row in rows)
    _PAGE.write_text(f"{before}<!-- faults -->\n{made}{table}<!-- end of faults -->{after}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="faults whose name has this; nothing is written")
    only = parser.parse_args().only
    rows = []
    for fault in FAULTS:
        if only is None or only in fault.name:
            rows.append(made(fault))
            print(" | ".join(rows[-1]), flush=True)
    if only is None or only in "restart":
        rows.append(restarted())
        print(" | ".join(rows[-1]), flush=True)
    if only is None:
        _write(rows)


if __name__ == "__main__":
    main()
