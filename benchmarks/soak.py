"""What grows in a long run: steps of one clipper, clippers made and dropped, lists that are new each time.

    PYTHONPATH=. python benchmarks/soak.py                 # all of it; writes benchmarks/DATE-soak.md
    PYTHONPATH=. python benchmarks/soak.py --steps 2000    # fewer steps, printed

One process on the CPU, and two ranks of gloo for the clippers and lists, whose plans live in the group.
At intervals, after a collection of garbage: resident memory, live objects, open descriptors, threads,
and the median time of a step since the interval before.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

import distnorm
from benchmarks.forked import start

ROOT = Path(__file__).parent
_POINTS = 10  # intervals
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Point:
    """What there is after some rounds.

    Args:
        rounds: that were made.
        mebibytes: resident memory, MiB.
        objects: that Python's collector knows.
        descriptors, threads: of the process.
        microseconds: median of a round's time since the point before.
    """

    rounds: int
    mebibytes: float
    objects: int
    descriptors: int
    threads: int
    microseconds: float

    def __str__(self) -> str:
        return (
            f"| {self.rounds} | {self.mebibytes:.1f} | {self.objects} | {self.descriptors} | {self.threads} "
            f"| {self.microseconds:.0f} |"
        )


def _points(round_: Callable[[int], None], rounds: int) -> Iterator[Point]:
    every = max(1, rounds // _POINTS)
    times: list[float] = []
    for number in range(1, rounds + 1):
        began = time.perf_counter()
        round_(number)
        times.append(time.perf_counter() - began)
        if number % every == 0 or number == 1:
            gc.collect()
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE / 2**20
            yield Point(
                number,
                resident,
                len(gc.get_objects()),
                len(os.listdir("/proc/self/fd")),
                threading.active_count(),
                statistics.median(times) * 1e6,
            )
            times = []


def _parameters(count: int, elements: int = 100) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.ones(elements)) for _ in range(count)]
    for parameter in made:
        parameter.grad = torch.ones(elements)
    return made


def steps(folder: Path) -> Callable[[int], None]:
    """One clipper, monitored, with a policy that has a history; its gradients are new in each step."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(8)))
    config = {
        "clip": {"policy": {"name": "zclip"}, "nonfinite": "skip"},
        "monitor": {"dir": str(folder), "every": 100},
    }
    clipper = distnorm.GradClipper(model, config)
    base = [torch.ones_like(parameter) for parameter in model.parameters()]

    def step(number: int) -> None:
        gradients = torch._foreach_mul(base, 1 + 0.1 * (number % 7))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        clipper.note(loss=1.0, step=number)
        clipper.clip()

    return step


def clippers(folder: Path) -> Callable[[int], None]:
    """A clipper of a new model, used twice and dropped."""

    def make(number: int) -> None:
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        clipper = distnorm.GradClipper(model, {"clip": {"max_norm": 1.0}})
        for _ in range(2):
            model.zero_grad()
            model(torch.ones(4, 16)).square().mean().backward()
            clipper.clip()

    return make


def handles(folder: Path) -> Callable[[int], None]:
    """`attach` to a new optimizer, used twice, and removed or just dropped."""

    def make(number: int) -> None:
        model = nn.Linear(16, 16)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        handle = distnorm.attach(model, optimizer, {"clip": {"max_norm": 1.0}})
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(4, 16)).square().mean().backward()
            optimizer.step()
        if number % 2:
            handle.remove()

    return make


def lists(folder: Path) -> Callable[[int], None]:
    """torch's functions on parameters that are new in each call, of another number and size."""

    def call(number: int) -> None:
        given: list[Tensor] = list(_parameters(1 + number % 13, 10 + number % 97))
        distnorm.clip_grad_norm_(given, 1.0)
        distnorm.get_total_norm([parameter.grad for parameter in given])

    return call


def sets(folder: Path) -> Callable[[int], None]:
    """A clipper whose model has another parameter in each step, and so plans again."""
    model = nn.ParameterList(_parameters(3))
    clipper = distnorm.GradClipper(model, {"clip": {"max_norm": 1.0}})

    def step(number: int) -> None:
        model[number % 3] = _parameters(1)[0]
        clipper.clip()

    return step


_HEAD = (
    "| rounds | resident, MiB | objects | descriptors | threads | µs a round |\n|---|---|---|---|---|---|\n"
)


def _section(made: Callable[[Path], Callable[[int], None]], rounds: int, size: int) -> str:
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)

        def body(rank: int) -> int:
            if size > 1:
                torch.distributed.init_process_group("gloo")
            round_ = made(folder)
            for point in _points(round_, rounds):
                if rank == 0:
                    print(point, flush=True)
            return 0

        ended = start(size, body, folder / "out").finish(time.monotonic() + 3600)
        codes = [one.code for one in ended.values()]
        note = "" if codes == [0] * size else f"\n\nThe ranks ended with {codes}: {ended[0].said[-500:]}"
    ranks = "one process" if size == 1 else f"{size} ranks"
    assert made.__doc__ is not None
    return f"## {made.__name__.capitalize()}, {ranks}\n{made.__doc__}\n\n{_HEAD}{ended[0].said}{note}\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50_000)
    asked = parser.parse_args().steps
    share = asked / 50_000
    plan = [
        (steps, 50_000, 1),
        (clippers, 1_000, 1),
        (handles, 1_000, 1),
        (lists, 5_000, 1),
        (sets, 1_000, 1),
    ]
    plan += [(steps, 2_000, 2), (clippers, 200, 2), (lists, 1_000, 2)]
    text = (
        f"# Soak, {date.today()}\n\n`PYTHONPATH=. python benchmarks/soak.py`, on {platform.machine()} "
        f"({os.cpu_count()} CPU cores, shared with much else, so times are upper bounds), Python "
        f"{platform.python_version()}, torch {torch.__version__}. Counts are rank 0's.\n"
    )
    for made, rounds, size in plan:
        section = _section(made, max(20, int(rounds * share)), size)
        print(section, flush=True)
        text += f"\n{section}"
    if share >= 1:
        (ROOT / f"{date.today()}-soak.md").write_text(text)


if __name__ == "__main__":
    main()
