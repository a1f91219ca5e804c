"""`distnorm plan`: what planning gives and costs one rank of a world that isn't there."""

from __future__ import annotations

import ctypes
import gc
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distnorm.config import Config
from distnorm.plan.plan import Share
from distnorm.sources import Layout, Source, modules_of, named_tensors, shards_of
from distnorm.sources.shards import GradShard
from distnorm.step import Step
from distnorm.verification.dry_ranks import DryRanks, Message, Rows, rows_of_stage

_Names = tuple[tuple[str, ...], ...]
Build = Callable[[Config, int, int], AbstractContextManager[tuple[nn.Module, _Names]]]
"""From a configuration, a rank and the number of ranks to its module and the tied names."""

_AXES = ("dp_replicate", "dp_shard", "tp")  # within a pipeline stage, outermost first


@dataclass(frozen=True, slots=True)
class Collectives:
    """Collectives of one kind, over a phase.

    Args:
        kind: as in `Message`.
        number: how many.
        sent, received: their bytes together.
        peers: with how many other ranks at most in one of them; `None` where the backend decides that.
    """

    kind: str
    number: int
    sent: int
    received: int
    peers: int | None


@dataclass(frozen=True, slots=True)
class Preview:
    """What one rank holds, counts and exchanges.

    Args:
        world, rank: how many ranks, and which this is.
        degrees: of the mesh, outermost axis first.
        backend: who cuts the model.
        parameters: of which this rank was given a piece, an empty one too.
        shards: pieces that have elements.
        elements_held, bytes_held: of these.
        replicas: number of shards with elements, by how many ranks hold the same one.
        elements_counted, bytes_read: what this rank measures in every step.
        planning, step: collectives of planning, and of every step after the first.
        planning_seconds: of this rank's own work, on this machine.
        planning_bytes: how far this process's memory rose meanwhile; `None` where the system doesn't say.
        notes: what is not in these numbers.
    """

    world: int
    rank: int
    degrees: dict[str, int]
    backend: str
    parameters: int
    shards: int
    elements_held: int
    bytes_held: int
    replicas: dict[int, int]
    elements_counted: int
    bytes_read: int
    planning: list[Collectives]
    step: list[Collectives]
    planning_seconds: float
    planning_bytes: int | None
    notes: list[str]


def main(
    config: Config,
    rank: int,
    as_json: bool,
    build: Build,
    partial_bytes: Callable[[Config, nn.Module], int],
) -> int:
    """Print the preview of a rank. The configuration's degrees say how many ranks there are."""
    found = preview(config, rank, build, partial_bytes)
    print(json.dumps(asdict(found), indent=2) if as_json else describe(found), flush=True)
    return 0


def preview(
    config: Config, rank: int, build: Build, partial_bytes: Callable[[Config, nn.Module], int]
) -> Preview:
    """Plan as one rank of the configuration's topology. Not collective: no other rank is there.

    Args:
        config: the run.
        rank: which rank.
        build: makes a rank's part of the model.
        partial_bytes: bytes of a module's gradients that arrive as partial sums.

    Raises:
        RunError: something needs ranks that exist.
    """
    parallel = config.train.parallel
    axes = {axis: int(getattr(parallel, axis)) for axis in _AXES}
    degrees = {"pp": int(parallel.pp), **axes}
    inner = axes["dp_replicate"] * axes["dp_shard"] * axes["tp"]
    size = inner * degrees["pp"]
    quiet = config.model_copy(update={"monitor": type(config.monitor)()})
    stages, mine = dict[int, Rows](), rank // inner
    for stage in range(degrees["pp"]):
        # This rank's own stage comes last, since planning needs its process group.
        at = (mine + 1 + stage) % degrees["pp"]
        with build(config, at * inner + rank % inner, size) as (module, tied):
            stages[at] = rows_of_stage(_shards(module, tied), axes, at * inner)
            if at == mine:
                ranks = DryRanks(rank, size, [stages[number] for number in sorted(stages)])
                found = _planned(quiet, ranks, module, tied)
                partial = partial_bytes(config, module)
    if partial:
        kind = "all-reduce of partial gradients"
        found["step"].insert(0, Collectives(kind, 1, partial, partial, axes["tp"] - 1))
    return Preview(
        world=size,
        rank=rank,
        degrees=degrees,
        backend=parallel.backend,
        notes=_notes(config),
        **found,
    )


def _shards(module: nn.Module, tied: _Names) -> list[GradShard]:
    return shards_of(named_tensors([module]), Source.GRADIENT, target=[module], layout=Layout(tied=tied))


def _planned(config: Config, ranks: DryRanks, module: nn.Module, tied: _Names) -> dict[str, Any]:
    """Plan, exchange what a step does, and say what that was."""
    _plan(config, ranks, module, tied)  # what is compiled or cached is no part of the time
    ranks.begin_again()
    before, began = _reset_peak(), time.perf_counter()
    step = _plan(config, ranks, module, tied)
    seconds = time.perf_counter() - began
    risen = None if before is None else _resident("VmHWM") - before
    planning = _together(ranks.messages)
    ranks.messages.clear()
    payload = step.groups.payload
    step.meter.join(0 if payload is None else payload.length)
    return {
        **_numbers(step.meter.shards, step.meter.shares),
        "planning": planning,
        "step": _together(ranks.messages),
        "planning_seconds": seconds,
        "planning_bytes": risen,
    }


def _plan(config: Config, ranks: DryRanks, module: nn.Module, tied: _Names) -> Step:
    """What `GradClipper` does when it is made."""
    with ranks.together():
        layout = Layout(tied=tied)
        step = Step(config, ranks, layout)
    named = named_tensors([module])
    # The other end of a tied pair is on another stage.
    listed = [(name, named[0][1]) for pair in tied for name in pair if named]

    def read() -> tuple[list[GradShard], list[tuple[str, torch.Tensor]]]:
        return shards_of(named, Source.GRADIENT, target=[module], layout=layout), [*named, *listed]

    step.plan(read, modules_of([module]))
    return step


def _numbers(shards: Sequence[GradShard], shares: Sequence[Share]) -> dict[str, Any]:
    held = [(shard, share) for shard, share in zip(shards, shares, strict=True) if shard.numel]
    sizes = [(shard.holder.element_size(), shard.numel, share.stop - share.start) for shard, share in held]
    return {
        "parameters": len(shards),
        "shards": len(held),
        "elements_held": sum(numel for _, numel, _ in sizes),
        "bytes_held": sum(size * numel for size, numel, _ in sizes),
        "replicas": dict(sorted(Counter(share.replicas for _, share in held).items())),
        "elements_counted": sum(counted for *_, counted in sizes),
        "bytes_read": sum(size * counted for size, _, counted in sizes),
    }


def _together(messages: Sequence[Message]) -> list[Collectives]:
    kinds = dict.fromkeys(message.kind for message in messages)
    return [_of_kind(kind, [m for m in messages if m.kind == kind]) for kind in kinds]


def _of_kind(kind: str, messages: Sequence[Message]) -> Collectives:
    peers = [message.peers for message in messages if message.peers is not None]
    sent, received = sum(m.sent for m in messages), sum(m.received for m in messages)
    return Collectives(kind, len(messages), sent, received, max(peers) if peers else None)


def _notes(config: Config) -> list[str]:
    notes = []
    if config.monitor.every is not None:
        notes.append(
            "monitor.every: what monitored steps exchange, and their table of the model, is not in it"
        )
    return notes


def _resident(key: str) -> int:
    """Bytes of this process's memory: `VmRSS` now, `VmHWM` at most since the last reset."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _reset_peak() -> int | None:
    """Let the high-water mark of memory start anew, and say from where; `None` where there is none."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed before would be used, and not be seen
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _resident("VmRSS")
    return None


def describe(found: Preview) -> str:
    """The preview as lines of text."""
    layout = " x ".join(f"{axis} {degree}" for axis, degree in found.degrees.items() if degree > 1)
    shards = ", ".join(
        f"{count:,} on {holders:,} rank{'s' if holders > 1 else ''}"
        for holders, count in found.replicas.items()
    )
    memory = "" if found.planning_bytes is None else f", {_size(found.planning_bytes)} of memory"
    lines = [
        f"rank {found.rank:,} of {found.world:,}: {found.backend}, {layout or 'single process'}",
        "",
        _line("holds", f"{found.shards:,} shards of {found.parameters:,} parameters"),
        _line("", f"{found.elements_held:,} elements, {_size(found.bytes_held)}"),
        _line("replicas", f"{shards or 'none'}"),
        _line("counts", f"{found.elements_counted:,} elements, reads {_size(found.bytes_read)} a step"),
        "",
        _line("planning", f"{1000 * found.planning_seconds:,.1f} ms of this rank's own work{memory}"),
        *[_line("", _collective(one)) for one in found.planning],
        _line("each step", "" if found.step else "no collective"),
        *[_line("", _collective(one)) for one in found.step],
        *[f"\nnote: {note}" for note in found.notes],
    ]
    return "\n".join(line.rstrip() for line in lines)


def _line(title: str, text: str) -> str:
    return f"  {title:<10}{text}"


def _collective(one: Collectives) -> str:
    name = (
        one.kind
        if one.number == 1
        else one.kind.replace("all-reduce", "all-reduces", 1).replace("exchange", "exchanges", 1)
    )
    if one.kind == "exchange":
        return (
            f"{one.number} {name} with at most {one.peers:,} other ranks each: "
            f"{_size(one.sent)} out, {_size(one.received)} in"
        )
    over = "all ranks" if one.peers is None else f"{one.peers + 1:,} ranks"
    return f"{one.number} {name} over {over}, {_size(one.sent)}{' together' if one.number > 1 else ''}"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"
