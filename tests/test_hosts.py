"""Several hosts on one machine: network namespaces whose cables (veth) end in one switch (a bridge)."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from distnorm.trainer.torch_trainer import TorchTrainer

from .trainer.tiny import CONFIGS, TINY, shipped, trace, train

TORCHRUN = CONFIGS.parent / "launch" / "torchrun.sh"
DAY = 86400.0  # seconds
SLOW = ("rate", "4mbit", "burst", "4kb", "latency", "2s")  # netem, which would delay, is rarer than tbf
CUT_AT = 2  # the step as which begins a host is cut off
TIMEOUT = 10  # seconds; a loaded machine takes several to make the groups


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def address(host: int) -> str:
    return f"10.83.7.{host + 1}"


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """The names of four namespaces; `cable` is the interface in each."""
    switch, *names = [f"dn-{os.getpid()}-{name}" for name in ("switch", *range(4))]
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for host, name in enumerate(names):
            ip("netns", "add", name)
            port = f"port{host}"
            ip("link", "add", "cable", "netns", name, "type", "veth", "peer", port, "netns", switch)
            ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            ip("-n", name, "address", "add", f"{address(host)}/24", "dev", "cable")
            for interface in ("lo", "cable"):
                ip("-n", name, "link", "set", interface, "up")
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces can be made here: {getattr(error, 'stderr', None) or error}")
    finally:
        for name in (switch, *names):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def start(host: int, name: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {
        **{"NNODES": "2", "NPROC_PER_NODE": "2", "RDZV_ENDPOINT": f"{address(0)}:29400"},
        **{"LOCAL_ADDR": address(host), "GLOO_SOCKET_IFNAME": "cable", "RDZV_TIMEOUT": "120"},
    }
    return subprocess.Popen(
        ["ip", "netns", "exec", name, str(TORCHRUN), "train", *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_two_hosts_have_the_bits_of_one(
    hosts: list[str], ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    sets = [word for key in (*TINY, f"train.output_dir={tmp_path / 'two'}") for word in ("--set", key)]
    both = [start(host, hosts[host], str(CONFIGS / "fsdp2_tp2.yaml"), *sets) for host in range(2)]
    said = [run.communicate(timeout=240)[0] for run in both]
    assert [run.returncode for run in both] == [0, 0], said
    ranks(4, train, shipped("fsdp2_tp2", tmp_path / "one"))
    assert trace(tmp_path / "two") == trace(tmp_path / "one")
    assert len(trace(tmp_path / "two")) == 3


def move(name: str) -> None:
    """Leave the process group, and this host for another, where `open_world` makes a new group."""
    dist.destroy_process_group()
    with open(f"/run/netns/{name}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
            raise OSError(ctypes.get_errno(), "setns")
    os.environ.update(MASTER_ADDR=address(0), MASTER_PORT="29400", GLOO_SOCKET_IFNAME="cable")


def train_on(names: list[str], output_dir: Path) -> int:
    """Train on one host for each rank, whose clocks are days apart."""
    rank = dist.get_rank()
    move(names[rank])
    clock = time.time
    time.time = lambda: clock() + (rank - 2) * DAY
    return train(shipped("fsdp2_tp2", output_dir))[0]


def slow_down(host: str) -> str:
    """Make what a host sends slow; returns why it can't be, if so."""
    # Users' PATHs need not have the folders of administrators' programs.
    program = shutil.which("tc", path=os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin")))
    if program is None:
        return "there is no tc"
    link = [program, "-n", host, "qdisc", "add", "dev", "cable", "root", "tbf", *SLOW]
    return subprocess.run(link, capture_output=True, text=True, check=False).stderr.strip()


def test_four_hosts_with_other_clocks_and_a_slow_link_have_the_bits_of_one(
    hosts: list[str], ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    obstacle = slow_down(hosts[3])
    assert ranks(4, train_on, hosts, tmp_path / "four") == [0] * 4
    ranks(4, train, shipped("fsdp2_tp2", tmp_path / "one"))
    assert trace(tmp_path / "four") == trace(tmp_path / "one")
    assert len(trace(tmp_path / "four")) == 3
    if obstacle:
        pytest.skip(f"the same, but no link can be slow here: {obstacle}")


def train_until_cut_off(names: list[str], output_dir: Path) -> None:
    """Train on one host for each rank; the cable of the last goes down as a step begins."""
    rank = dist.get_rank()
    move(names[rank])
    step_of = TorchTrainer.step

    def step(self: TorchTrainer, number: int) -> Any:
        if number == CUT_AT:
            ip("link", "set", "cable", "down")
        return step_of(self, number)

    if rank == 3:
        TorchTrainer.step = step  # type: ignore[method-assign]
    train(shipped("fsdp2_tp2", output_dir, f"train.timeout={TIMEOUT}"))


def test_a_host_that_is_cut_off_is_named_by_the_others(
    hosts: list[str], ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    failures = ranks(4, train_until_cut_off, hosts, tmp_path, expect_errors=True)
    assert [failure.type_name for failure in failures] == ["LostRankError"] * 4, failures
    absent = f"rank 3 did not come to step {CUT_AT}'s gradient: it was last at step {CUT_AT - 1}'s row"
    assert all(absent in failure.message for failure in failures[:3])
    assert f"a rank was lost at step {CUT_AT}'s gradient, and the store" in failures[3].message
    assert len(trace(tmp_path)) == CUT_AT - 1
