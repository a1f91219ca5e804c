"""Tables for people, and all samples for programs."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import distnorm
from distnorm.bench.limit import Limit
from distnorm.bench.rounds import Row, Table
from distnorm.trainer.world import World

_HEADER = ("", "ms", "quartiles", "GB/s", "% of limit", "x torch", "error")

_LIBRARIES = ("torch", "deepspeed", "torchtitan")


def machine(world: World) -> dict[str, Any]:
    """What the numbers were taken on, and with."""
    gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    versions: dict[str, str | None] = {"python": platform.python_version(), "distnorm": distnorm.__version__}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    return {
        "command": " ".join(sys.argv),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "gpu": gpu},
        "versions": versions,
        "device": world.device.type,
        "ranks": world.size,
        "threads": torch.get_num_threads(),
    }


def _cpu() -> str:
    """The processor's name, which the standard library doesn't know on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def heading(facts: dict[str, Any], limit: Limit) -> str:
    """Machine, versions and limit, in a few lines."""
    hardware, threads = facts["hardware"], facts["threads"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    ranks = f"{facts['ranks']} rank{'s' if facts['ranks'] > 1 else ''}"
    lines = [
        f"{facts['date']}  {hardware['cpu']}, {hardware['cores']} cores"
        + (f", {hardware['gpu']}" if hardware["gpu"] else ""),
        versions,
        f"{ranks} on {facts['device']}, {threads} thread{'s' if threads > 1 else ''} each; "
        f"limit of a rank while all work: reads {limit.read / 1e9:.2f} GB/s, "
        f"reads and writes {limit.write / 1e9:.2f} GB/s, all-reduce {limit.latency * 1e6:.0f} us",
    ]
    return "\n".join(lines)


def text_of(table: Table) -> str:
    """One table, columns aligned."""
    cells = [_HEADER, *(_cells(table, row) for row in table.rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADER))]
    lines = [
        f"{table.workload}: {table.title}",
        f"  {table.tensors:,} tensors, {table.bytes / 1e6:,.1f} MB to move; the limit is "
        f"{1e3 * table.limit:.3f} ms; x torch is the time's ratio to that of {table.reference!r}",
    ]
    for line, row in zip(cells, (None, *table.rows), strict=True):
        rest = (text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))
        tail = f"  {row.problem}" if row is not None and row.problem else ""
        lines.append(("  " + "  ".join([line[0].ljust(widths[0]), *rest])).rstrip() + tail)
    return "\n".join(lines)


def _cells(table: Table, row: Row) -> tuple[str, ...]:
    error = "-" if row.error is None else f"{row.error:.0e}"
    if not row.seconds:
        return (row.name, "-", "-", "-", "-", "-", error)
    low, high = row.quartiles
    reference = table.reference_median
    return (
        row.name,
        f"{1e3 * row.median:.3f}",
        f"{1e3 * low:.3f} to {1e3 * high:.3f}",
        f"{table.bytes / row.median / 1e9:.2f}",
        f"{100 * table.limit / row.median:.0f}",
        "-" if reference is None else f"{row.median / reference:.2f}",
        error,
    )


def caveats(facts: dict[str, Any]) -> str:
    """How these numbers can mislead."""
    lines = [
        "Times are of the slowest rank, medians over rounds; what else ran on this machine is in them.",
        "The limit is a plain sum and a copy of 256 MiB a rank. Gradients that fit a cache, which restoring "
        "them has just filled, can be faster: above 100 %.",
        "Peers are called as functions: Megatron's rule and DeepSpeed's on plain local tensors that cost "
        "nothing to get, as in their engines. Overlap with other work is not seen.",
    ]
    if facts["ranks"] > 1:
        lines.append(
            f"All {facts['ranks']} ranks may be on one machine: an all-reduce there says little of a network."
        )
    if facts["device"] == "cpu":
        cores, busy = facts["hardware"]["cores"] or 1, facts["ranks"] * facts["threads"]
        lines.append("gloo on CPUs says nothing about GPU kernels or NCCL.")
        if busy > cores:
            lines.append(f"{busy} threads share {cores} cores, so ranks wait for each other's turns.")
    return "How this can mislead\n" + "\n".join(f"  - {line}" for line in lines)


def document(facts: dict[str, Any], limit: Limit, tables: Sequence[Table]) -> dict[str, Any]:
    """Everything, with all samples; times in seconds."""
    return {**facts, "limit": asdict(limit), "workloads": [_table(table) for table in tables]}


def _table(table: Table) -> dict[str, Any]:
    return {
        "workload": table.workload,
        "title": table.title,
        "tensors": table.tensors,
        "bytes": table.bytes,
        "limit_seconds": table.limit,
        "reference": table.reference,
        "contenders": [_row(table, row) for row in table.rows],
    }


def _row(table: Table, row: Row) -> dict[str, Any]:
    timed = bool(row.seconds)
    reference = table.reference_median
    return {
        "name": row.name,
        "seconds": list(row.seconds),
        "median": row.median if timed else None,
        "quartiles": list(row.quartiles) if timed else None,
        "bytes_per_second": table.bytes / row.median if timed else None,
        "percent_of_limit": 100 * table.limit / row.median if timed else None,
        "ratio_to_reference": row.median / reference if timed and reference is not None else None,
        "relative_error": _plain(row.error),
        "problem": row.problem,
        "agrees": row.agrees,
    }


def _plain(error: float | None) -> float | str | None:
    """JSON has no inf and no NaN."""
    return error if error is None or math.isfinite(error) else str(error)
