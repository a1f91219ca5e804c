"""`distnorm watch`: a page on this machine, or a screen in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from distnorm.monitor.watch.server import Server, serve

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def main(runs: Sequence[str | Path], host: str, port: int, terminal: bool) -> int:
    """Follow runs until Ctrl-C.

    Args:
        runs: their folders; a run may not have begun.
        host: the address to listen at; others than loopback let everybody read the runs who reaches it.
        port: 0 lets the system choose.
        terminal: draw in the terminal, and serve nothing.

    Returns:
        0.

    Raises:
        RunError: there is no such run, or the port can't be had.
        DistnormError: plotly, jinja2 or rich isn't installed.
    """
    if terminal:
        from distnorm.monitor.watch.terminal import main as draw

        return draw([Path(run) for run in runs])
    serve(runs, host, port, _announce)
    return 0


def _announce(server: Server) -> None:
    port = server.server_address[1]
    print(f"{server.url}  (Ctrl-C ends it)", flush=True)
    if server.host in _LOOPBACK:
        print(
            f"from another machine: ssh -L {port}:127.0.0.1:{port} THIS_MACHINE, then http://localhost:{port}/"
        )
    else:
        print(
            f"everybody who reaches {server.host} can read these runs: there is no password", file=sys.stderr
        )
    sys.stdout.flush()
