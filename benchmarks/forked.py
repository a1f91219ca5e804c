"""Ranks as processes that are forked from one which has imported torch, so that a start costs no import.

Each is as under torchrun: the same environment, a store in a process of its own, and exit codes. No agent
ends the other ranks when one has failed, as none does across machines until its own ranks fail.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # which optimizers and DDP import at their first use
import torch.distributed as dist

import distnorm.trainer.run
import distnorm.trainer.torch_trainer  # noqa: F401  what ranks would import, each by itself
from distnorm import cli

_LOOK = 0.01  # seconds between two looks at the ranks
_STORE_WAITS = timedelta(seconds=60)


@dataclass(slots=True)
class Ended:
    """How a rank ended.

    Args:
        code: exit code, or minus the signal; `None` if it had to be killed at the deadline.
        at: when, by `time.monotonic`, which is the same clock in all processes.
        said: what it printed.
        starved: seconds that its main thread had work, and waited for a core.
    """

    code: int | None
    at: float
    said: str
    starved: float = 0.0


@dataclass(slots=True)
class Ranks:
    """Processes that were started together.

    Args:
        folder: where each writes what it prints.
        processes: by rank.
        store: the process that hosts their store.
        began: when, by `time.monotonic`.
    """

    folder: Path
    processes: dict[int, int]
    store: int
    began: float
    ended: dict[int, Ended] = field(default_factory=dict)
    starved: dict[int, float] = field(default_factory=dict)

    def look(self) -> None:
        """Take note of ranks that have ended, and of how long those that run had to wait for a core."""
        for rank, process in self.processes.items():
            if rank not in self.ended:
                with suppress(OSError):  # a kernel that doesn't count it
                    waited = Path(f"/proc/{process}/schedstat").read_text().split()[1]
                    self.starved[rank] = int(waited) / 1e9
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    self._note(rank, os.waitstatus_to_exitcode(status))

    def _note(self, rank: int, code: int | None) -> None:
        said = (self.folder / f"rank{rank}.txt").read_text(errors="replace")
        self.ended[rank] = Ended(code, time.monotonic(), said, self.starved.get(rank, 0.0))

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a rank that has not ended."""
        if rank not in self.ended:
            os.kill(self.processes[rank], number)

    def finish(self, deadline: float, enough: Callable[[], bool] = lambda: False) -> dict[int, Ended]:
        """Wait for the ranks, and end those that still run at the deadline.

        Args:
            deadline: by `time.monotonic`.
            enough: whether to end them sooner.
        """
        while len(self.ended) < len(self.processes) and time.monotonic() < deadline and not enough():
            self.look()
            time.sleep(_LOOK)
        for rank, process in self.processes.items():
            if rank not in self.ended:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                self._note(rank, None)
        os.kill(self.store, signal.SIGKILL)
        os.waitpid(self.store, 0)
        return dict(sorted(self.ended.items()))


def start(
    size: int,
    body: Callable[[int], int],
    folder: Path,
    *,
    environ: Mapping[str, str] | None = None,
    address: str = "127.0.0.1",
    enter: Callable[[int], None] = lambda rank: None,
) -> Ranks:
    """Start ranks.

    Args:
        size: how many.
        body: what each runs, by its rank; gives its exit code.
        folder: where what they print is kept.
        environ: further variables of their environment.
        address: of the store.
        enter: called first in each rank's process, and with -1 in that of the store.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]

    def host() -> int:
        enter(-1)
        store = dist.TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=_STORE_WAITS)
        while True:
            time.sleep(60 if store else 0)

    def work(rank: int) -> Callable[[], int]:
        def run() -> int:
            enter(rank)
            os.environ.update(
                {
                    **{"MASTER_ADDR": address, "MASTER_PORT": str(port), "WORLD_SIZE": str(size)},
                    **{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)},
                    **{"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"},
                    **(environ or {}),
                }
            )
            torch.set_num_threads(1)
            return body(rank)

        return run

    began = time.monotonic()
    store = _fork(host, folder / "store.txt")
    processes = {rank: _fork(work(rank), folder / f"rank{rank}.txt") for rank in range(size)}
    return Ranks(folder, processes, store, began)


def command(*arguments: str) -> int:
    """Run a command of distnorm's, in this process."""
    return cli.main(arguments)


def _fork(run: Callable[[], int], output: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)  # also for one that never runs
    process = os.fork()
    if process:
        os.close(descriptor)
        return process
    code = 1
    try:
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = run()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
