"""A pool of ranks for tests, and a dense oracle for what they measure.

Nothing in the library imports this file. The pool is one server process that has imported torch. Every run
forks its ranks from it: that takes milliseconds, and leaves nothing behind (groups, meshes, caches).
"""

from __future__ import annotations

import datetime
import faulthandler
import gc
import math
import multiprocessing
import os
import pickle
import re
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

# Imported once, in the server: some of these cost a rank of its own two seconds at first use.
_preloaded = ["distnorm.testing", "distnorm.functional", "hypothesis", "pydantic", "pytest", "yaml"]
_preloaded += ["torch._dynamo", "torch.profiler", "torch.distributed.checkpoint", "torch.distributed.fsdp"]
_preloaded += ["torch.distributed.pipelining", "torch.distributed.tensor.parallel", "distnorm.hooks"]

# What a rank sees when the fault is somebody else's: the neighbour left, or never came.
_NEIGHBOURS_FAULT = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|connect ?timeout|socket timeout|pair closure"
    r"|timed out (waiting|after)|wait timeout|store.*timeout",
    re.IGNORECASE,
)
_CONSEQUENCES = re.compile(r"RuntimeError|Dist\w*Error|Connection\w*Error|BrokenPipeError|TimeoutError")

# How long the other ranks get to say what they saw once one of them has failed.
_GRACE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class RankFailure:
    """What one rank raised; `exception` is None where the exception itself can't be pickled."""

    rank: int
    type_name: str
    message: str
    traceback: str
    exception: BaseException | None
    when: float

    @property
    def is_root(self) -> bool:
        """Whether the failure is this rank's own, not a connection that broke because another rank failed."""
        return not (_CONSEQUENCES.fullmatch(self.type_name) and _NEIGHBOURS_FAULT.search(self.message))


class RankError(Exception):
    """A run failed on some rank. The text is the root failure's; `failures` holds all, the root first."""

    def __init__(self, message: str, failures: Sequence[RankFailure] = ()) -> None:
        super().__init__(message)
        self.failures = tuple(failures)


class RankTimeout(RankError):
    """Some rank was still running when the time was up. The text holds the stacks of those ranks."""


@dataclass(frozen=True, slots=True)
class _Job:
    rank: int
    world_size: int
    folder: Path
    environ: dict[str, str]
    payload: bytes  # pickled apart, so that a body that can't be imported is reported like any other failure
    collective_timeout: float

    @property
    def stacks(self) -> Path:
        return self.folder / f"stacks{self.rank}"


def _outcome(job: _Job) -> tuple[bool, bytes]:
    # Plain pickle carries tensors by value; multiprocessing's would share their memory by file descriptor.
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=(job.folder / "rendezvous").as_uri(),
            rank=job.rank,
            world_size=job.world_size,
            timeout=datetime.timedelta(seconds=job.collective_timeout),
        )
        body, args = pickle.loads(job.payload)
        return True, pickle.dumps(body(*args))
    except BaseException as error:  # the parent decides what a failure means, a SystemExit included
        when = time.monotonic()
        exception: BaseException | None = error
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            exception = None
        text = "".join(traceback.format_exception(error))
        return False, pickle.dumps(
            RankFailure(job.rank, type(error).__name__, str(error), text, exception, when)
        )


def _rank_main(job: _Job, pipe: Connection) -> None:
    gc.freeze()  # plans search what the collector knows: not through all that the server has imported
    os.environ.clear()
    os.environ.update(job.environ, RANK=str(job.rank), LOCAL_RANK=str(job.rank))
    with job.stacks.open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        succeeded, outcome = _outcome(job)
        pipe.send_bytes(outcome)
        # One that has failed leaves, which ends its neighbours' wait; from others they may still be reading.
        if succeeded:
            pipe.poll(None)
        faulthandler.unregister(signal.SIGUSR1)


def preload(*modules: str) -> None:
    """Import modules in the server too, once for all ranks; to be called before any pool's first `run`."""
    _preloaded.extend(name for name in modules if name not in _preloaded)


class RankPool:
    """Runs a function on several ranks of a fresh gloo process group, in processes of this machine.

    Args:
        max_ranks: the largest world size that `run` accepts.
    """

    def __init__(self, max_ranks: int = 8) -> None:
        self.max_ranks = max_ranks
        self._context = multiprocessing.get_context("forkserver")

    def run(
        self,
        world_size: int,
        body: Callable[..., Any],
        *args: object,
        timeout: float = 60.0,
        expect_errors: bool = False,
        collective_timeout: float | None = None,
    ) -> list[Any]:
        """Call `body(*args)` on every rank of a group of `world_size`, and return what the ranks returned.

        Args:
            world_size: number of ranks, 1 to `max_ranks`.
            body: a module-level function; it, the arguments and the results are pickled (tensors by value).
            args: its arguments, the same on every rank; the body asks torch.distributed for its rank.
            timeout: seconds until every rank that still runs is killed.
            expect_errors: return a `RankFailure` in the place of each rank that raised, instead of raising.
            collective_timeout: the process group's own timeout in seconds; by default `timeout`.

        Returns:
            One entry a rank, in rank order.

        Raises:
            RankError: a rank raised or died; the root failure, not a neighbour's broken connection.
            RankTimeout: ranks were still running after `timeout` seconds; their numbers and stacks.
        """
        if not 1 <= world_size <= self.max_ranks:
            raise ValueError(f"world_size is {world_size}; this pool runs 1 to {self.max_ranks} ranks")
        payload = pickle.dumps((body, args))
        environ = {**os.environ, "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
        self._start_server()
        with tempfile.TemporaryDirectory(prefix="distnorm-ranks-") as folder:
            jobs = [
                _Job(rank, world_size, Path(folder), environ, payload, collective_timeout or timeout)
                for rank in range(world_size)
            ]
            return self._run_jobs(jobs, timeout, expect_errors)

    def _start_server(self) -> None:
        # Thread counts are read when the server imports torch and numpy: the setting has to be there by then.
        self._context.set_forkserver_preload(_preloaded)
        with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
            forkserver.ensure_running()

    def _run_jobs(self, jobs: list[_Job], timeout: float, expect_errors: bool) -> list[Any]:
        processes: list[ForkServerProcess] = []
        pipes: list[Connection] = []
        try:
            for job in jobs:
                ours, theirs = self._context.Pipe()
                process = self._context.Process(target=_rank_main, args=(job, theirs), daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            outcomes = _collect(pipes, processes, timeout, expect_errors)
            failures = [outcome for outcome in outcomes.values() if isinstance(outcome, RankFailure)]
            running = [job for job in jobs if job.rank not in outcomes]
            if running and (expect_errors or not failures):
                stacks = _stacks(running, processes)
                raise RankTimeout(f"{_ranks(running)} still running after {timeout} s\n{stacks}", failures)
            if failures and not expect_errors:
                raise _root_error(failures, running, len(jobs)) from failures[0].exception
            return [outcomes[job.rank] for job in jobs]
        finally:
            _end(pipes, processes)


def _collect(
    pipes: list[Connection], processes: list[ForkServerProcess], timeout: float, expect_errors: bool
) -> dict[int, Any]:
    """What ranks reported, until all have, the time is up, or one has failed and the grace is over."""
    outcomes: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(outcomes) < len(pipes) and (left := deadline - time.monotonic()) > 0:
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in outcomes}
        for pipe in wait(list(waiting), left):
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            outcomes[rank] = _receive(pipe, rank, processes[rank])
            if isinstance(outcomes[rank], RankFailure) and not expect_errors:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    return outcomes


def _receive(pipe: Connection, rank: int, process: ForkServerProcess) -> Any:
    try:
        data = pipe.recv_bytes()
    except (EOFError, OSError):
        process.join(_GRACE_SECONDS)
        message = f"the process ended without a result (exit code {process.exitcode})"
        return RankFailure(rank, "ProcessDied", message, message, None, time.monotonic())
    return pickle.loads(data)


def _root_error(failures: list[RankFailure], running: list[_Job], world_size: int) -> RankError:
    failures.sort(key=lambda failure: (not failure.is_root, failure.when))
    root = failures[0]
    lines = [f"rank {root.rank} of {world_size} failed first:\n{root.traceback.rstrip()}"]
    lines += [f"rank {f.rank} then: {f.type_name}: {f.message.partition(chr(10))[0]}" for f in failures[1:]]
    if running:
        lines.append(f"{_ranks(running)} still running {_GRACE_SECONDS:g} s later, and stopped")
    return RankError("\n".join(lines), failures)


def _ranks(jobs: list[_Job]) -> str:
    return f"rank{'s' if len(jobs) > 1 else ''} {', '.join(str(job.rank) for job in jobs)}"


def _stacks(jobs: list[_Job], processes: list[ForkServerProcess]) -> str:
    for job in jobs:
        if (pid := processes[job.rank].pid) is not None and job.stacks.exists():
            os.kill(pid, signal.SIGUSR1)
    time.sleep(0.3)  # faulthandler writes from the signal's handler; there is nothing to wait on
    texts = {job.rank: job.stacks.read_text() if job.stacks.exists() else "(not started)" for job in jobs}
    return "\n".join(f"rank {rank}:\n{text.rstrip()}" for rank, text in texts.items())


def _end(pipes: list[Connection], processes: list[ForkServerProcess]) -> None:
    for pipe in pipes:
        pipe.close()  # this is what ranks that have succeeded wait for
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
        process.close()


def dense_norm(tensors: Mapping[str, torch.Tensor], p: float = 2.0) -> float:
    """The p-norm of all elements of the whole (unsharded) tensors together, in fp64 in this one process.

    It shares no code with the library, and so can judge it. Elements are scaled by the largest before they
    are raised to p, so neither 1e300 nor a large p overflows.

    Args:
        tensors: name -> whole tensor, of any dtype (complex counts |z|) and any device.
        p: order of the norm, > 0 or inf.

    Returns:
        The norm; 0.0 without elements, nan where an element is nan, else inf where one is infinite.
    """
    wide = {True: torch.complex128, False: torch.float64}
    magnitudes = [t.detach().cpu().to(wide[t.is_complex()]).abs() for t in tensors.values() if t.numel()]
    if any(bool(m.isnan().any()) for m in magnitudes):
        return math.nan
    largest = max((float(m.max()) for m in magnitudes), default=0.0)
    if largest == 0.0 or math.isinf(largest) or math.isinf(p):
        return largest
    return float(largest * math.fsum(float((m / largest).pow(p).sum()) for m in magnitudes) ** (1.0 / p))
