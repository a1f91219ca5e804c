"""`distnorm bench`: run workloads one after the other, and report."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch.distributed as dist

from distnorm import Config, load_config
from distnorm.bench import ROUNDS, WORKLOADS, report
from distnorm.bench.limit import BUFFER_ELEMENTS, measure_limit
from distnorm.bench.peers import Peers, find_peers
from distnorm.bench.rounds import Table, Variant, run_rounds
from distnorm.bench.workloads import BY_NAME, Setting, own
from distnorm.trainer.world import World, open_world


def main(
    workloads: Sequence[str] = (),
    *,
    device: str = "auto",
    rounds: int = ROUNDS,
    json_file: str | None = None,
    config: str | None = None,
    peers: Peers | None = None,
    scale: float = 1.0,
) -> int:
    """Time all contenders, print a table for each variant on rank 0. Every rank calls it.

    Args:
        workloads: names; by default the configuration's, or else all that fit the number of ranks.
        device: `auto`, `cpu` or `cuda`.
        rounds: how often each contender is timed.
        json_file: where rank 0 writes all samples.
        config: a configuration whose topology is timed as well.
        peers: other libraries; by default those that are installed.
        scale: of the models' sizes.

    Returns:
        0, or 1 where a contender's norm or scaling is wrong; the same on every rank.

    Raises:
        DistnormError: on every rank: the configuration is wrong, or a workload can't run on these ranks.
    """
    loaded = None if config is None else load_config(config, [f"train.device={device}"])
    with _joined(device) as world:
        if json_file is not None:
            world.together(json_file, lambda: _reserve(Path(json_file), world))
        names = workloads or (() if loaded else [n for n in WORKLOADS if n != "large" or world.size == 1])
        _progress(world, "importing peers")
        setting = Setting(world, find_peers(world.device) if peers is None else peers, scale)
        _progress(world, "measuring the limit")
        limit = measure_limit(world, setting.count(BUFFER_ELEMENTS))
        facts = report.machine(world)
        _say(world, report.heading(facts, limit))
        tables: list[Table] = []
        for variant in _variants(names, loaded, setting):
            _progress(world, f"{variant.workload}: {variant.title}")
            tables.append(run_rounds(variant, rounds, limit))
            _say(world, "\n" + report.text_of(tables[-1]))
            del variant
            gc.collect()
        _say(world, "\n" + report.caveats(facts))
        if json_file is not None and world.rank == 0:
            text = json.dumps(report.document(facts, limit, tables), indent=1, allow_nan=False)
            Path(json_file).write_text(text + "\n", encoding="utf-8")
        return 0 if all(row.agrees for table in tables for row in table.rows) else 1


@contextmanager
def _joined(device: str) -> Iterator[World]:
    """torchrun's process group, one that is there already, or one of this process alone."""
    os.environ.setdefault("DISTNORM_NATIVE", "now")  # what is compiled meanwhile would be timed as well
    with open_world(_any_topology(device)) as world:
        alone = not dist.is_initialized()
        if alone:
            backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        try:
            yield world
        finally:
            if alone:
                dist.destroy_process_group()


def _any_topology(device: str) -> Config:
    """A configuration that joins all ranks there are; its model is never built."""
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    parallel = {"backend": "ddp", "dp_replicate": size}
    return load_config({"train": {"device": device, "parallel": parallel, "data": {"batch_size": size}}})


def _variants(names: Sequence[str], config: Config | None, setting: Setting) -> Iterator[Variant]:
    """All variants, each built when the one before is done with."""
    sources: list[Callable[[], Iterator[Variant]]] = [partial(BY_NAME[name], setting) for name in names]
    if config is not None:
        sources.append(partial(own, config, setting))
    for source in sources:
        yield from source()
        gc.collect()


def _reserve(path: Path, world: World) -> None:
    """Fail now, not after minutes, where the file can't be written."""
    if world.rank == 0:
        path.open("a", encoding="utf-8").close()


def _say(world: World, text: str) -> None:
    if world.rank == 0:
        print(text, flush=True)


def _progress(world: World, text: str) -> None:
    if world.rank == 0:
        print(text, file=sys.stderr, flush=True)
