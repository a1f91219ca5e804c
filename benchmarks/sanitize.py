"""The compiled code under AddressSanitizer and UndefinedBehaviorSanitizer: `python benchmarks/sanitize.py`.

    PYTHONPATH=. python benchmarks/sanitize.py [--rounds 300] [--seed 0]

Builds native.c and walk.cpp with both sanitizers, and drives them with random tensors: of all dtypes and
sizes, at odd addresses, ending where their memory does, by one thread and by two; and with gradients, plain
ones and DTensors, that are replaced, freed, made smaller, expanded, given strides or another dtype between
two steps. Every number is compared with NumPy's in fp64. Before that, memory behind a tensor's and memory
that was freed are read, which must be found. The last line is "no finding"; else the report is shown, and
the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

SANITIZE = "-g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
DTYPES = ("float32", "float64", "bfloat16", "float16")
SIZES = (0, 1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 1000, 65_535, 65_536, 65_537, 150_001)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the compiled code under sanitizers.")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=list(PARTS), help="what this very process runs")
    asked = parser.parse_args()
    if asked.part:
        from distnorm.kernels import compiling

        compiling._TIMEOUT = 3600.0  # sanitizers make code that takes minutes to compile on a busy machine
        PARTS[asked.part](asked.rounds, random.Random(asked.seed))
        return 0
    with tempfile.TemporaryDirectory() as cache:
        for part, finding in (("overrun", "heap-buffer-overflow"), ("freed", "heap-use-after-free")):
            told = _run(cache, part, asked)
            if finding not in told:
                print(told, f"{part}: expected {finding}, and nothing was found", sep="\n")
                return 1
        for part in ("kernels", "walker"):
            told = _run(cache, part, asked)
            if not told.endswith(f"{part}: done\n"):
                print(told, f"{part}: a finding", sep="\n")
                return 1
            print(told, end="")
    print("no finding")
    return 0


def _run(cache: str, part: str, asked: argparse.Namespace) -> str:
    """What a process says that has the sanitizer's library from its start."""
    compilers = {"CC": os.environ.get("CC", "cc"), "CXX": os.environ.get("CXX", "c++")}
    paths = [
        _output(compilers["CXX"], f"-print-file-name={name}") for name in ("libasan.so", "libstdc++.so.6")
    ]
    environ = {
        **os.environ,
        **{name: f"{command} {SANITIZE}" for name, command in compilers.items()},
        "DISTNORM_CACHE": cache,
        "DISTNORM_NATIVE": "now",
        "LD_PRELOAD": " ".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, __file__, "--part", part, f"--rounds={asked.rounds}", f"--seed={asked.seed}"]
    done = subprocess.run(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.stdout


def _output(command: str, *arguments: str) -> str:
    assert shutil.which(command.split()[0]), f"there is no compiler {command}"
    plain = {**os.environ, "LD_PRELOAD": ""}
    return subprocess.run(
        [*command.split(), *arguments], capture_output=True, text=True, check=True, env=plain
    ).stdout.strip()


def overrun(rounds: int, dice: random.Random) -> None:
    """Read behind a tensor's memory."""
    import torch

    from distnorm.kernels import AddressTable, Kernel, statistic_at

    table = AddressTable.of([tensor := torch.ones(33)])
    statistic_at(table.part(np.array([0]), np.array([35])), Kernel.SQUARES)
    del tensor


def freed(rounds: int, dice: random.Random) -> None:
    """Read memory that was freed."""
    import torch

    from distnorm.kernels import AddressTable, Kernel, statistic_at

    statistic_at(AddressTable.of([torch.ones(33)]), Kernel.SQUARES)


def kernels(rounds: int, dice: random.Random) -> None:
    """Every compiled kernel, on random tensors."""
    import torch

    from distnorm import kernels
    from distnorm.kernels import AddressTable, Kernel, native

    assert native.library() is not None
    for _ in range(rounds):
        tensors = [_tensor(dice) for _ in range(dice.randrange(12))]
        threads = dice.choice((1, 2))
        native._threads = lambda elements, threads=threads: threads  # type: ignore[assignment, misc]
        wide = [_wide(tensor) for tensor in tensors]
        everything = np.concatenate([np.zeros(1), *wide])
        table = AddressTable.of(tensors)
        expected = {
            Kernel.SQUARES: np.square(everything).sum(),
            Kernel.MAGNITUDES: np.abs(everything).sum(),
            Kernel.LARGEST: np.abs(everything).max(),
        }
        for kernel, value in expected.items():
            assert np.isclose(float(kernels.statistic_at(table, kernel)), value, rtol=1e-12)
            rows = native.summaries(table, kernel).numpy()
            zeros = [(one == 0).sum() for one in wide]
            assert (rows[:, 2] == zeros).all() and (rows[:, 3] == 0).all()
        starts = np.array([dice.randrange(t.numel() + 1) for t in tensors], dtype=np.int64)
        numels = np.array([dice.randrange(t.numel() + 1 - s) for t, s in zip(tensors, starts, strict=True)])
        part = table.part(starts, numels.astype(np.int64))
        cut = [w[s : s + n] for w, s, n in zip(wide, starts, numels, strict=True)]
        value = np.square(np.concatenate([np.zeros(1), *cut])).sum()
        assert np.isclose(float(kernels.statistic_at(part, Kernel.SQUARES)), value, rtol=1e-12)
        for tensor, one in zip(tensors, wide, strict=True):
            if tensor.numel():
                assert int(kernels.checksum(tensor)) == int(kernels.eager.checksum(tensor))
                assert np.allclose(native.row_squares([tensor]).numpy(), one**2, rtol=1e-12)
        prints = native.fingerprints(table)
        sampled = kernels.samples(table).numpy()
        kernels.scale_(tensors, torch.tensor(0.5, dtype=torch.float64))
        for tensor, one in zip(tensors, wide, strict=True):
            assert np.allclose(_wide(tensor), one / 2, rtol=1e-2, atol=1e-7)
        changed = np.array([tensor.numel() > 0 for tensor in tensors], dtype=bool)
        assert ((native.fingerprints(table) != prints) == changed).all()
        assert np.allclose(kernels.samples(table).numpy(), sampled / 2, rtol=1e-2, atol=1e-4)
        large = torch.randn(dice.randrange(262_145, 600_000))
        assert native.fingerprints(AddressTable.of([large]))[0] != 0
    print(f"kernels: {rounds} rounds")
    print("kernels: done", flush=True)


def _tensor(dice: random.Random) -> Any:
    """Whole memory of its own, or the end of one: what lies behind it is nobody's."""
    import torch

    size, offset = dice.choice(SIZES), dice.choice((0, 0, 1, 3, 5))
    return torch.randn(size + offset, dtype=torch.float64).to(getattr(torch, dice.choice(DTYPES)))[offset:]


def _wide(tensor: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    found: np.ndarray[Any, np.dtype[np.float64]] = tensor.double().numpy().copy()
    return found


def walker(rounds: int, dice: random.Random) -> None:
    """Gradients that change between steps, and those that were found and are held meanwhile."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    from distnorm.kernels import Finder, Kernel, addresses_of, statistic_at, walking

    assert walking._kept() or walking._load(compiles=True), "walk.cpp has not been compiled"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))

    def made(local: Any, is_distributed: bool) -> Any:
        return DTensor.from_local(local, mesh) if is_distributed else local

    found_again = 0
    for round_ in range(rounds):
        spread = round_ % 2 == 1
        dtypes = [getattr(torch, dice.choice(DTYPES)) for _ in range(dice.randrange(1, 30))]
        locals_ = [torch.randn(dice.randrange(1, 90)).to(dtype) for dtype in dtypes]
        holders = [nn.Parameter(made(torch.zeros_like(local), spread)) for local in locals_]
        for holder, local in zip(holders, locals_, strict=True):
            holder.grad = made(local, spread)
        finder = Finder([holder.grad for holder in holders])
        held = []
        for _ in range(6):
            odd = _change(dice, holders, lambda local: made(local, spread))  # noqa: B023
            found = finder(holders)
            assert (found is None) == odd
            if found is not None:
                found_again += 1
                held.append((found, [tensor.clone() for tensor in found.tensors()]))
            # Plain ones though their parameters have others by now; local tensors are their parameters' own.
            for one, values in held[-3:] if not spread else held[-1:] if found is not None else ():
                tensors = one.tensors()
                if one.addresses.tolist() == addresses_of(tensors).tolist():  # none was resized meanwhile
                    assert all(torch.equal(t, v) for t, v in zip(tensors, values, strict=True))
                    statistic_at(finder.table.at(one.addresses), Kernel.SQUARES)
                    one.mark_changed()
            for holder, local in zip(holders, locals_, strict=True):
                holder.grad = None
                holder.grad = made(torch.randn(local.shape).to(local.dtype), spread)
    print(f"walker: {rounds} rounds, {found_again} times all gradients were found")
    print("walker: done", flush=True)
    dist.destroy_process_group()


def _change(dice: random.Random, holders: Sequence[Any], made: Callable[[Any], Any]) -> bool:
    """Change some gradient; whether that must be looked at with care."""
    import torch

    holder = dice.choice(holders)
    gradient = holder.grad
    local = getattr(gradient, "_local_tensor", gradient)
    numel, kind = local.numel(), dice.randrange(9)
    if kind < 2:  # none, or a new one in its place
        if kind:
            holder.grad = made(local.clone())
        return False
    if kind == 2:
        holder.grad = None
        return True
    if kind == 3:
        local.untyped_storage().resize_(dice.randrange(local.nbytes))
        return True
    if kind == 4:
        local.untyped_storage().resize_(
            local.nbytes + dice.randrange(1, 1000)
        )  # all of it is there, elsewhere
        return False
    other = {
        5: lambda: torch.ones((), dtype=local.dtype).expand(numel + 1),
        6: lambda: torch.zeros(2 * numel + 2, dtype=local.dtype)[::2],
        7: lambda: local.to(torch.float64 if local.dtype is not torch.float64 else torch.float32),
        8: lambda: torch.zeros(numel + 1, dtype=local.dtype),
    }[kind]()
    if gradient is local:
        holder.data = torch.empty(other.shape, dtype=other.dtype)
        holder.grad = None
        holder.grad = other
        holder.data = torch.empty(numel, dtype=local.dtype)
    else:
        gradient._local_tensor = other
    return True


PARTS = {"overrun": overrun, "freed": freed, "kernels": kernels, "walker": walker}

if __name__ == "__main__":
    sys.exit(main())
