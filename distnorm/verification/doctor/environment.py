"""`distnorm doctor --env`: what is in use here, and what is slower than it could be, with the cure."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist

from distnorm.kernels import native

_OPTIONAL = ("numpy", "triton", "deepspeed", "transformers", "accelerate", "lightning", "torchtitan")


def main() -> int:
    """Print the environment; 0 always."""
    print("\n".join(describe()))
    return 0


def describe() -> Iterator[str]:
    """The environment, a line each; what could be faster last, each with its cure. Local."""
    yield from _versions()
    yield from _devices()
    slower = list(_slower())
    yield "slower than it could be: " + ("nothing" if not slower else "")
    for fact, cure in slower:
        yield f"  {fact}"
        yield f"    cure: {cure}"


def _versions() -> Iterator[str]:
    from importlib.metadata import PackageNotFoundError, version

    yield f"python      {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield f"torch       {torch.__version__}"
    for name in ("distnorm", *_OPTIONAL):
        try:
            yield f"{name.ljust(11)} {version(name)}"
        except PackageNotFoundError:
            continue


def _devices() -> Iterator[str]:
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} CPUs"
    yield f"cpu         {threads}; gradients are read by {'compiled C' if native.library() else 'operators'}"
    compilers = [f"{name} ({path})" for name in ("cc", "c++", "nvcc") if (path := shutil.which(name))]
    yield f"compilers   {', '.join(compilers) or 'none'}"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        yield f"cuda:{index}      {torch.cuda.get_device_name(index)}"
    if dist.is_available():
        able = [
            name
            for name, is_there in (
                ("gloo", dist.is_gloo_available()),
                ("nccl", dist.is_nccl_available()),
                ("mpi", dist.is_mpi_available()),
            )
            if is_there
        ]
        yield f"backends    {', '.join(able) or 'none'}"
        if dist.is_initialized():
            yield f"group       {dist.get_world_size()} ranks, {dist.get_backend_config()}"


def _slower() -> Iterator[tuple[str, str]]:
    if native.library() is None:
        if os.environ.get("DISTNORM_NATIVE") == "0":
            yield "DISTNORM_NATIVE=0: torch's operators read CPU gradients", "unset DISTNORM_NATIVE"
        else:
            yield (
                "no compiled code: torch's operators read CPU gradients, several times slower",
                "install a C compiler (or set CC to yours) and let DISTNORM_CACHE name a folder of your own",
            )
    if torch.cuda.is_available() and _missing("triton"):
        yield "no Triton: torch's operators read GPU gradients", "pip install triton"
    threads, cpus = torch.get_num_threads(), _cpus()
    if threads < cpus and not os.environ.get("OMP_NUM_THREADS"):
        yield f"{threads} of {cpus} CPUs are used", f"set OMP_NUM_THREADS={cpus} divided by the local ranks"
    if sys.version_info < (3, 11):
        yield f"python {platform.python_version()}: the host's part of a step is slower", "use 3.11 or newer"
    if dist.is_available() and dist.is_initialized():
        backend = str(dist.get_backend_config())
        if torch.cuda.is_available() and "nccl" not in backend:
            yield f"a process group of {backend}: GPU tensors go by the host", "init_process_group('nccl')"


def _missing(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is None


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
