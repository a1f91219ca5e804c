"""The faults that `benchmarks/faults.py` makes: what is done, to which rank, and to what runs."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_saver

import distnorm
from benchmarks.forked import command
from distnorm.step import Step
from distnorm.trainer.torch_trainer import TorchTrainer

ROOT = Path(__file__).parent.parent
SIZE, BAD, AT = 3, 1, 3  # ranks, the one that has the fault, and the step before which it has it
TIMEOUT = 10  # seconds
ADDRESSES = ("10.83.9.1", "10.83.9.2")
NOBODY = 65534

Action = Callable[[Any], None]
Body = Callable[[int, Path], int]


@dataclass(frozen=True)
class Fault:
    """A fault, and what has it.

    Args:
        name, done: what it is, and what is done to make it.
        body: what a rank runs, of its number and the folder for its files; gives the exit code.
        prepare: makes what is needed outside of the ranks, of that folder, and gives what removes it.
        enter: called first in each process.
        address: of the store.
        environ: of the ranks.
        harmless: whether the run is expected to end well.
    """

    name: str
    done: str
    body: Body
    prepare: Callable[[Path], Callable[[], None]] = lambda folder: lambda: None
    enter: Callable[[int], None] = lambda rank: None
    address: str = "127.0.0.1"
    environ: Mapping[str, str] = field(default_factory=dict)
    harmless: bool = False


def mark(folder: Path) -> None:
    """Note the moment of the fault."""
    (folder / "moment").write_text(repr(time.monotonic()))


def trainer(
    *sets: str,
    bad: tuple[str, ...] = (),
    action: Action | None = None,
    before: tuple[Any, str] = (TorchTrainer, "step"),
) -> Body:
    """A body that runs the reference trainer on DDP.

    Args:
        sets: configuration of all ranks.
        bad: that of the bad rank alone.
        action: what the bad rank does, with the trainer as the step begins.
        before: what it does it before instead: what holds a function, and that one's name.
    """

    def body(rank: int, folder: Path) -> int:
        if action is not None and rank == BAD:
            _at_call(*before, action, folder)
        keys = [
            *("clip.max_norm=0.25", "train.steps=6", "train.device=cpu", f"train.timeout={TIMEOUT}"),
            *("train.model={dim: 16, layers: 1, heads: 2, context: 8}", "train.data.batch_size=6"),
            f"train.parallel={{backend: ddp, dp_replicate: {SIZE}, dp_shard: 1, tp: 1, pp: 1}}",
            *(f"train.output_dir={folder / 'run'}", *sets, *(bad if rank == BAD else ())),
        ]
        config = str(ROOT / "configs" / "quickstart.yaml")
        return command("train", config, "--resume", *(word for key in keys for word in ("--set", key)))

    return body


def _at_call(owner: Any, name: str, action: Action, folder: Path) -> None:
    function = getattr(owner, name)

    def acts_first(*given: Any, **named: Any) -> Any:
        if owner is not TorchTrainer or given[1] == AT:
            mark(folder)
            action(given[0] if given else None)
        return function(*given, **named)

    setattr(owner, name, acts_first)


def own_loop(kind: str, *, notes: bool = False, ddp: bool = False) -> Body:
    """A body that trains in a loop of its own, with an error for whatever is raised.

    Args:
        kind: what the bad rank does: "forget" or "double" a `clip`, or "sleep" or "exit" before it.
        notes: whether it gives `note` its number of each step.
        ddp: whether the gradients are those of DDP, which reduces in backward on the same group.
    """

    def body(rank: int, folder: Path) -> int:
        dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        wrapped = nn.parallel.DistributedDataParallel(model) if ddp else model
        own = [(f"stage{rank}.{name}", parameter) for name, parameter in model.named_parameters()]
        clipper = distnorm.GradClipper(model if ddp else own, {"clip": {"max_norm": 0.5}})
        for step in range(1, 7):
            model.zero_grad()
            wrapped(torch.randn(4, 8)).square().sum().backward()
            if notes:
                clipper.note(step=step)
            has_fault = rank == BAD and step == AT
            if has_fault:
                mark(folder)
            if has_fault and kind in ("sleep", "exit"):
                time.sleep(3 * TIMEOUT if kind == "sleep" else 0)
                os._exit(7)
            if not (has_fault and kind == "forget"):
                clipper.clip()
            if has_fault and kind == "double":
                clipper.clip()
        return 0

    return body


def _kill(trainer: TorchTrainer) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(trainer: TorchTrainer) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _late(seconds: float) -> Action:
    return lambda trainer: time.sleep(seconds)


def _without_clip(trainer: TorchTrainer) -> None:
    clip = trainer.clipper.clip

    def once() -> Any:
        trainer.clipper.clip = clip  # type: ignore[method-assign]
        return trainer.clipper.last

    trainer.clipper.clip = once  # type: ignore[method-assign]


def _with_two_clips(trainer: TorchTrainer) -> None:
    clip = trainer.clipper.clip

    def twice() -> Any:
        trainer.clipper.clip = clip  # type: ignore[method-assign]
        clip()
        return clip()

    trainer.clipper.clip = twice  # type: ignore[method-assign]


def _with_another_clock(trainer: TorchTrainer) -> None:
    clock = time.time
    time.time = lambda: clock() - 86400.0


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


def _mounted(size: str, then: str = "") -> Callable[[Path], Callable[[], None]]:
    def prepare(folder: Path) -> Callable[[], None]:
        place = folder / "disk"
        place.mkdir()
        _run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
        if then:
            _run("mount", "-o", then, str(place))
        return lambda: _run("umount", "-l", str(place))

    return prepare


def _on_disk(*sets: str) -> Body:
    def body(rank: int, folder: Path) -> int:
        return trainer(f"train.output_dir={folder / 'disk' / 'run'}", *sets)(rank, folder)

    return body


def _private_folder(folder: Path) -> Callable[[], None]:
    (folder / "disk").mkdir(mode=0o755)
    (folder / "text").write_bytes((ROOT / "tests" / "trainer" / "numbers.txt").read_bytes())
    folder.chmod(0o755)
    return lambda: None


def _as_nobody(rank: int, folder: Path) -> int:
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    return _on_disk(f"train.data.path={folder / 'text'}")(rank, folder)


def _names() -> list[str]:
    return [f"dn-faults-{os.getpid()}-{i}" for i in range(2)]


_hosts: list[str] = []


def _two_hosts(folder: Path) -> Callable[[], None]:
    _hosts[:] = _names()
    for name in _hosts:
        _run("ip", "netns", "add", name)
    link = ("ip", "link", "add", "cable", "netns", _hosts[0], "type", "veth", "peer", "cable")
    _run(*link, "netns", _hosts[1])
    for name, address in zip(_hosts, ADDRESSES, strict=True):
        _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable")
        for interface in ("lo", "cable"):
            _run("ip", "-n", name, "link", "set", interface, "up")

    def remove() -> None:
        for name in _hosts:
            _run("ip", "netns", "del", name)

    return remove


def _enter_host(rank: int) -> None:
    with open(f"/run/netns/{_hosts[rank == BAD]}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
            raise OSError(ctypes.get_errno(), "setns")


def _cut(trainer: TorchTrainer) -> None:
    _run("ip", "link", "set", "cable", "down")


_CABLE = {"GLOO_SOCKET_IFNAME": "cable"}
_EVERY = "train.checkpoint.every=1"

FAULTS = [
    Fault("killed", "`kill -9` as step 3 begins", trainer(action=_kill)),
    Fault("killed, own loop", "the process ends before `clip()` of step 3", own_loop("exit")),
    Fault("stopped", "SIGSTOP as step 3 begins", trainer(action=_stop)),
    Fault("stopped, own loop", "it sleeps before `clip()` of step 3", own_loop("sleep")),
    Fault(
        *("stopped, group", "SIGSTOP before the process group is made"),
        trainer(action=_stop, before=(dist, "init_process_group")),
    ),
    Fault(
        *("stopped, plan", "SIGSTOP before `GradClipper` plans"), trainer(action=_stop, before=(Step, "plan"))
    ),
    Fault(
        *("stopped, checkpoint", "SIGSTOP before tensors are saved"),
        trainer(_EVERY, action=_stop, before=(state_dict_saver, "save")),
    ),
    Fault("slow", "step 3 begins 6 s late", trainer(action=_late(0.6 * TIMEOUT)), harmless=True),
    Fault("too slow", "step 3 begins 30 s late", trainer(action=_late(3.0 * TIMEOUT))),
    Fault(
        *("cut off", "a host of its own, whose cable goes down as step 3 begins", trainer(action=_cut)),
        **{"prepare": _two_hosts, "enter": _enter_host, "address": ADDRESSES[0], "environ": _CABLE},
    ),
    Fault("`clip()` forgotten, trainer", "none in step 3; DDP", trainer(action=_without_clip)),
    Fault("`clip()` twice, trainer", "two in step 3; DDP", trainer(action=_with_two_clips)),
    Fault("`clip()` forgotten", "none in step 3; own loop, `note(step=...)`", own_loop("forget", notes=True)),
    Fault("`clip()` twice", "two in step 3; own loop, `note(step=...)`", own_loop("double", notes=True)),
    Fault("`clip()` forgotten, DDP", "none in step 3; own loop", own_loop("forget", ddp=True)),
    Fault("`clip()` twice, DDP", "two in step 3; own loop", own_loop("double", ddp=True)),
    Fault("another configuration", "`clip.max_norm=0.7`", trainer(bad=("clip.max_norm=0.7",))),
    Fault("another model", "`train.model.dim=32`", trainer(bad=("train.model.dim=32",))),
    Fault("another seed", "`train.seed=7`", trainer(bad=("train.seed=7",))),
    Fault("full disk", "checkpoints into 64 KiB; all ranks", _on_disk(_EVERY), prepare=_mounted("64k")),
    Fault(
        *("full disk, rows", "rows into 4 KiB, without checkpoints", _on_disk()),
        **{"prepare": _mounted("4k"), "harmless": True},
    ),
    Fault("no permission", "a folder of another user's; all ranks", _as_nobody, prepare=_private_folder),
    Fault("read-only folder", "a mount; all ranks", _on_disk(), prepare=_mounted("1m", "remount,ro")),
    Fault(
        *("clock", "back by a day as step 3 begins", trainer(_EVERY, action=_with_another_clock)),
        harmless=True,
    ),
]
