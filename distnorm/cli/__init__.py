"""The command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from distnorm.cli.arguments import make_parser
from distnorm.cli.commands import BAD_INPUT
from distnorm.errors import DistnormError

__all__ = ["main", "make_parser", "tell"]

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Under torchrun every rank calls it; `train`, `verify` and `bench` are collective, the others are not.

    Args:
        argv: the arguments after the program's name; the process's own by default.

    Returns:
        The exit code: 0; 1 where `verify`, `compare` or `bench` found a difference, or a rank was lost;
        2 for bad input, explained on stderr; 130 after Ctrl-C.

    Raises:
        SystemExit: with 0 after ``--help`` and ``--version``, with 2 for wrong arguments.
    """
    arguments = vars(make_parser().parse_args(argv))
    command: Callable[..., int] = arguments.pop("command")
    try:
        return command(**arguments)
    except DistnormError as error:
        tell(error)
        return int(getattr(error, "exit_code", BAD_INPUT))
    except KeyboardInterrupt:
        return _INTERRUPTED


def tell(error: DistnormError) -> None:
    """Say what is wrong, in one write, so that the lines of several ranks don't mix."""
    sys.stderr.write("".join(f"distnorm: error: {line}\n" for line in str(error).splitlines()))
