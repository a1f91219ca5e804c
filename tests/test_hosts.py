"""Several hosts on one machine: network namespaces that a cable (veth) joins, each with its own agent."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .trainer.tiny import CONFIGS, TINY, shipped, trace, train

TORCHRUN = CONFIGS.parent / "launch" / "torchrun.sh"
ADDRESSES = ("10.83.7.1", "10.83.7.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """The names of two namespaces; `cable` is the interface in each."""
    names = [f"dn-{os.getpid()}-{i}" for i in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for interface in ("lo", "cable"):
                ip("-n", name, "link", "set", interface, "up")
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces can be made here: {getattr(error, 'stderr', None) or error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def start(host: str, address: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {
        **{"NNODES": "2", "NPROC_PER_NODE": "2", "RDZV_ENDPOINT": f"{ADDRESSES[0]}:29400"},
        **{"LOCAL_ADDR": address, "GLOO_SOCKET_IFNAME": "cable", "RDZV_TIMEOUT": "120"},
    }
    return subprocess.Popen(
        ["ip", "netns", "exec", host, str(TORCHRUN), "train", *arguments],
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
    both = [
        start(host, address, str(CONFIGS / "fsdp2_tp2.yaml"), *sets)
        for host, address in zip(hosts, ADDRESSES, strict=True)
    ]
    said = [run.communicate(timeout=240)[0] for run in both]
    assert [run.returncode for run in both] == [0, 0], said
    ranks(4, train, shipped("fsdp2_tp2", tmp_path / "one"))
    assert trace(tmp_path / "two") == trace(tmp_path / "one")
    assert len(trace(tmp_path / "two")) == 3
