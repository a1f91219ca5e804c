"""``python -m distnorm.launch``: torchrun, whose failures end in a line that says what to do.

It takes torchrun's arguments and runs torch's own elastic agent, without its traceback. A configuration that
``-m distnorm train`` or ``verify`` would refuse is refused before any process starts.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from distnorm import ConfigError, RunError, cli, load_config

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_FAILED = 1
_BAD_INPUT = 2
_SAID_ALREADY = (_BAD_INPUT, 130)  # by the ranks themselves: bad input, and that a signal stopped them


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun.

    Args:
        argv: torchrun's arguments; the process's own by default.

    Returns:
        0; or the exit code of the rank that failed first; or 128 and the signal that ended it, or this.
    """
    torchrun = _import_torchrun()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    arguments = torchrun.parse_args(list(sys.argv[1:] if argv is None else argv))
    try:
        _check(arguments)
    except (ConfigError, RunError) as error:
        cli.tell(error)
        return _BAD_INPUT
    if "LOGLEVEL" not in os.environ:  # what the agent logs of failures is said below
        for name in logging.root.manager.loggerDict:
            if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
                logging.getLogger(name).setLevel(logging.CRITICAL)
    began = time.monotonic()
    try:
        torchrun.run(arguments)
    except ChildFailedError as error:
        return _of_ranks(error, ours=_command(arguments) is not None)
    except SignalException as error:
        _say(f"stopped by {signal.Signals(error.sigval).name}")
        return 128 + int(error.sigval)
    except RendezvousError as error:
        _say(_of_meeting(error, arguments, time.monotonic() - began))
        return _FAILED
    return 0


def _import_torchrun() -> ModuleType:
    """torch reads the level at import, and would show its C++ stack for each attempt to connect."""
    name = "TORCH_CPP_LOG_LEVEL"
    given = os.environ.get(name)
    os.environ.setdefault(name, "FATAL")
    from torch.distributed import run

    if given is None:  # the ranks do as ever
        del os.environ[name]
    return run


def _command(arguments: Namespace) -> list[str] | None:
    """The arguments of distnorm's command; `None` where a script is run."""
    ours = arguments.module and arguments.training_script == "distnorm"
    return list(arguments.training_script_args) if ours else None


def _check(arguments: Namespace) -> None:
    """Refuse what every rank would refuse, and a number of processes that can't be known."""
    command = _command(arguments)
    if command is not None:
        parsed = vars(cli.make_parser().parse_args(command))
        if isinstance(config := parsed.get("config"), str):
            load_config(config, parsed["overrides"])
    import torch

    if arguments.nproc_per_node == "gpu" and not torch.cuda.is_available():
        raise RunError(
            "there is no GPU on this machine, and nobody said how many processes to start: set "
            "NPROC_PER_NODE, or --nproc-per-node, to their number"
        )


def _of_ranks(error: ChildFailedError, ours: bool) -> int:
    rank, failure = error.get_first_failure()
    if ours and failure.exitcode in _SAID_ALREADY:
        return int(failure.exitcode)
    if failure.exitcode < 0:
        how = f"was ended by {_name_of(-failure.exitcode)}"
        if failure.exitcode == -signal.SIGKILL:
            how += " (by the system, if it ran out of memory)"
    else:
        how = f"ended with exit code {failure.exitcode}"
    others = len(error.failures) - 1
    more = f"; after it {others} more of this node" if others else ""
    _say(f"rank {rank} on {socket.gethostname()} {how}{more}")
    return int(failure.exitcode) if failure.exitcode > 0 else 128 - int(failure.exitcode)


def _of_meeting(error: Exception, arguments: Namespace, waited: float) -> str:
    where, run, kind = arguments.rdzv_endpoint, arguments.rdzv_id, type(error).__name__
    if kind == "RendezvousTimeoutError":
        return (
            f"waited {waited:.0f} s at {where} for {arguments.nnodes} nodes of run {run!r}, not all came: "
            "start the same command with the same RDZV_ID on each (RDZV_TIMEOUT says how long)"
        )
    if kind == "RendezvousClosedError":
        return f"run {run!r} at {where} is over already; give the new one another RDZV_ID"
    cause = (str(error.__cause__ or error).splitlines() or [kind])[0]
    return (
        f"waited {waited:.0f} s for {where} (RDZV_ENDPOINT), and could not connect: {cause}; start the same "
        "command on that node too, or correct the address"
    )


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return f"signal {number}"


def _say(text: str) -> None:
    sys.stderr.write(f"distnorm.launch: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
