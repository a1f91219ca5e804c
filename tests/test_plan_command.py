"""`distnorm plan`: what it says of ranks that don't exist, against ranks that do."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distnorm import ConfigError, RunError, cli, load_config
from distnorm.config import Config
from distnorm.config.scaling import degrees_of, scaled_to
from distnorm.measure import partials
from distnorm.plan import join
from distnorm.plan.collectives import Ranks
from distnorm.testing import preload
from distnorm.trainer import dry_run
from distnorm.trainer.run import build
from distnorm.trainer.torch_trainer import TorchTrainer
from distnorm.trainer.world import open_world
from distnorm.verification.preview import preview

preload("distnorm.trainer.run", "torch.distributed.fsdp", "torch.distributed.pipelining")
CONFIGS = Path(__file__).parent.parent / "configs"
TINY = ["train.model.dim=36", "train.model.layers=4", "train.model.context=8", "train.device=cpu"]
TINY += [f"train.data.path={CONFIGS.parent / 'LICENSE'}"]
NAMES = sorted(path.name for path in CONFIGS.glob("*.yaml") if not path.name.startswith("zero"))


def tiny(name: str, *overrides: str) -> Config:
    """A shipped configuration with a small model, some of whose pieces are uneven."""
    return load_config(CONFIGS / name, [*TINY, *overrides])


def worlds(config: Config) -> list[int]:
    found = []
    for world in (1, 2, 4, 8):
        try:
            found.append(math.prod(degrees_of(scaled_to(config, world)).values()))
        except ConfigError:
            continue
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every configuration on the smallest world that it fits, one on all; not read again in every rank."""
    if metafunc.function is test_it_says_of_every_rank_what_real_ranks_do:
        cases = [(name, worlds(tiny(name))[0]) for name in NAMES]
        cases += [("ddp4.yaml", world) for world in worlds(tiny("ddp4.yaml"))[1:]]
        metafunc.parametrize(("name", "world"), cases)


def watched() -> list[tuple[str, int, int, int | None]]:
    """A list that gets every message of this rank from now on: kind, bytes out and in, peers."""
    seen: list[tuple[str, int, int, int | None]] = []
    all_reduce, exchange, reduce_partial = Ranks.all_reduce_, Ranks.exchange, partials.reduce_partial_

    def all_reducing(self: Ranks, tensor: torch.Tensor, op: str) -> torch.Tensor:
        if self.size > 1:
            seen.append(("all-reduce", tensor.nbytes, tensor.nbytes, None))
        return all_reduce(self, tensor, op)

    def exchanging(self: Ranks, rows: torch.Tensor, send: Any, receive: Any) -> torch.Tensor:
        out = exchange(self, rows, send, receive)
        others = [{peer: n for peer, n in counts.items() if peer != self.rank} for counts in (send, receive)]
        sizes = [sum(n.values()) * t.shape[1] * 8 for n, t in zip(others, (rows, out), strict=True)]
        seen.append(("exchange", *sizes, len(others[0].keys() | others[1].keys())))
        return out

    def reducing_partial(buffer: torch.Tensor, groups: Any) -> torch.Tensor:
        (group,) = groups
        seen.append(("all-reduce of partial gradients", buffer.nbytes, buffer.nbytes, group.size() - 1))
        return reduce_partial(buffer, groups)

    Ranks.all_reduce_, Ranks.exchange = all_reducing, exchanging  # type: ignore[method-assign]
    partials.reduce_partial_ = reducing_partial
    return seen


def summed(messages: list[tuple[str, int, int, int | None]]) -> list[dict[str, Any]]:
    found = []
    for kind in dict.fromkeys(message[0] for message in messages):
        ours = [message for message in messages if message[0] == kind]
        peers = [message[3] for message in ours if message[3] is not None]
        found.append(
            {
                "kind": kind,
                "number": len(ours),
                "sent": sum(m[1] for m in ours),
                "received": sum(m[2] for m in ours),
                "peers": max(peers) if peers else None,
            }
        )
    return found


def real(config: Config, most_in_one_hop: int) -> dict[str, Any]:
    """What this rank is found to hold, count and exchange in a run."""
    join.MOST_IN_ONE_HOP = most_in_one_hop
    seen = watched()
    with open_world(config) as world:
        trainer = build(config, world)
        assert isinstance(trainer, TorchTrainer)
        planning = summed(seen)
        for step in (1, 2):  # the first agrees on partial gradients
            seen.clear()
            trainer.step(step)
        meter = trainer.clipper._step.meter
        held = [(s, share) for s, share in zip(meter.shards, meter.shares, strict=True) if s.numel]
        size = getattr(torch, config.train.dtype).itemsize
        locals_of = [s.witness().numel() for s, _ in held]
        counted = sum(share.stop - share.start for _, share in held)
        return {
            "world": world.size,
            "rank": world.rank,
            "parameters": len(meter.shards),
            "shards": len(held),
            "elements_held": sum(locals_of),
            "bytes_held": sum(locals_of) * size,
            "replicas": dict(sorted(Counter(share.replicas for _, share in held).items())),
            "elements_counted": counted,
            "bytes_read": counted * size,
            "planning": planning,
            "step": summed(seen),
        }


def previewed(config: Config, rank: int, most_in_one_hop: int) -> dict[str, Any]:
    """What is said of a rank, in a process of its own: torch keeps coordinates of equal meshes."""
    dist.destroy_process_group()
    join.MOST_IN_ONE_HOP = most_in_one_hop
    found = preview(config, rank, dry_run.model_of, dry_run.partial_bytes)
    kept = asdict(found)
    for key in ("degrees", "backend", "planning_seconds", "planning_bytes", "notes"):
        kept.pop(key)
    return kept


def without_monitor(config: Config) -> Config:
    return config.model_copy(update={"monitor": type(config.monitor)()})


@pytest.mark.slow
def test_it_says_of_every_rank_what_real_ranks_do(ranks, name: str, world: int) -> None:
    config = scaled_to(tiny(name), world)
    found = ranks(world, real, without_monitor(config), join.MOST_IN_ONE_HOP, timeout=240)
    middle = world // 2 if config.train.parallel.pp > 1 else 0  # a stage that holds neither end
    for rank in {0, middle, world - 1}:
        assert ranks(1, previewed, config, rank, join.MOST_IN_ONE_HOP) == [found[rank]]
    whole = dry_run.Transformer(config)
    assert sum(one["elements_counted"] for one in found) == sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize(("name", "world"), [("fsdp4.yaml", 5), ("pp2_hsdp2x2.yaml", 8)])
@pytest.mark.slow
def test_it_says_what_real_ranks_do_in_two_hops(ranks, name: str, world: int) -> None:
    config = scaled_to(tiny(name), world)
    found = ranks(world, real, config, 1, timeout=240)
    for rank in range(world):
        assert ranks(1, previewed, config, rank, 1) == [found[rank]]


@pytest.mark.slow
def test_sixteen_thousand_ranks_are_planned_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(CONFIGS / "hsdp2x2_tp2.yaml"), "--world", "16384", "--rank", "9000", "--json"]
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["world"], found["rank"]) == (16384, 9000)
    assert found["degrees"] == {"pp": 1, "dp_replicate": 2, "dp_shard": 4096, "tp": 2}
    (exchanges,) = [one for one in found["planning"] if one["kind"] == "exchange"]
    assert exchanges["peers"] <= 254
    assert exchanges["number"] == 12


def test_the_text_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(CONFIGS / "quickstart.yaml"), "--rank", "3"]) == 0
    text = capsys.readouterr().out
    for part in (
        "rank 3 of 4: fsdp2, dp_shard 2 x tp 2",
        "43 shards of 43 parameters",
        "205,952 elements, 823.8 kB",
        "25 on 1 rank, 18 on 2 ranks",
        "each step",
        "1 all-reduce over all ranks, 16 bytes",
        "ms of this rank's own work",
    ):
        assert part in text


def test_degrees_grow_to_the_world_and_what_would_fit_is_named() -> None:
    config = tiny("pp2_fsdp2_tp2.yaml")
    scaled = scaled_to(config, 64)
    assert degrees_of(scaled) == {"pp": 2, "dp_replicate": 1, "dp_shard": 16, "tp": 2}
    assert degrees_of(scaled_to(tiny("ddp4.yaml"), 3))["dp_replicate"] == 3
    assert degrees_of(scaled_to(tiny("single.yaml"), 5))["dp_shard"] == 5
    assert scaled_to(config, 8) == config
    load_config(scaled.model_dump())  # the batch fits too
    with pytest.raises(ConfigError, match=r"multiple of 4 \(pp 2 x tp 2\).*found 30; 28 and 32 would fit"):
        scaled_to(config, 30)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["zero1.yaml"], ("deepspeed", "engine")),
        (["quickstart.yaml", "--rank", "4"], ("--rank", "0 to 3", "4")),
        (["quickstart.yaml", "--world", "5"], ("--world", "multiple of 2", "4 and 6")),
        (["quickstart.yaml", "--set", "clip.policy=adagc", "--set", "clip.max_norm=null"], ("clip", "table")),
    ],
)
def test_what_it_cannot_say_is_refused(
    arguments: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(CONFIGS / arguments[0]), *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def test_monitored_steps_are_said_not_to_be_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(CONFIGS / "monitor.yaml")]) == 0
    assert "note: monitor.every" in capsys.readouterr().out


def test_a_process_group_that_is_there_is_left_alone() -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        with pytest.raises(RunError, match="found one"):
            preview(tiny("single.yaml"), 0, dry_run.model_of, dry_run.partial_bytes)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
