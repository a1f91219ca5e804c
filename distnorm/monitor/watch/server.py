"""The page of runs that are followed, over HTTP: read-only, on loopback unless --host says another one."""

from __future__ import annotations

import gzip
import ipaddress
import socket
import sys
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from distnorm.errors import RunError
from distnorm.monitor.watch.answers import Answers
from distnorm.monitor.watch.follower import follow

_WORTH_COMPRESSING = 4096
_ALWAYS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Server(ThreadingHTTPServer):
    """Answers from what it holds of the runs; no address names a file.

    Args:
        answers: what there is to say.
        host: the address to listen at.
        port: 0 lets the system choose.

    Raises:
        OSError: the port is taken, or the address isn't this machine's.
    """

    daemon_threads = True

    def __init__(self, answers: Answers, host: str, port: int) -> None:
        self.answers, self.host = answers, host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.names = {"localhost", host.lower(), socket.gethostname().lower()}
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        """Where the page is."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        """Bind, without the look-up of this machine's name that the standard library makes."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a reader who has gone away; anything else is a defect of ours, and is shown."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "distnorm", ""
    timeout = 60

    def do_GET(self) -> None:
        """Answer one of four addresses."""
        if not self._is_for_us():
            said = "expected this machine's name or address as Host; --host NAME adds a name\n"
            self._send(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", said)
            return
        asked = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(asked.query).items()}
        answers = self.server.answers
        found: dict[str, Callable[[], str]] = {
            "/": answers.page,
            "/rows": lambda: answers.rows(query.get("have", "")),
            "/text": lambda: answers.text(query.get("open", "").split(",")),
            "/layers": lambda: answers.layers(int(query.get("run", "0"))),
        }
        make = found.get(asked.path)
        if make is None:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "nothing here\n")
            return
        try:
            body = make()
        except (ValueError, IndexError):
            self._send(HTTPStatus.BAD_REQUEST, "text/plain", "not understood\n")
        except RunError as error:
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", f"{error}\n")
        else:
            self._send(HTTPStatus.OK, "text/html" if asked.path == "/" else "application/json", body)

    do_HEAD = do_GET

    def _is_for_us(self) -> bool:
        """Whether Host names this machine: a page of another name that leads here must read nothing."""
        try:
            name = (urlsplit(f"//{self.headers.get('Host', '')}").hostname or "").lower()
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.server.names
        return True  # a page that has an address as its name comes from that address

    def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode("utf-8")
        self.send_response(status)
        for name, value in _ALWAYS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        # The page has a policy of its own in it, with the hashes of its scripts; both hold.
        rest = "" if kind == "text/html" else "default-src 'none'; "
        self.send_header("Content-Security-Policy", f"{rest}frame-ancestors 'none'")
        if len(body) >= _WORTH_COMPRESSING and "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body, compresslevel=1)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a page that asks every second would fill the terminal."""


def serve(runs: Sequence[str | Path], host: str, port: int, ready: Callable[[Server], object]) -> None:
    """Serve the page until Ctrl-C.

    Args:
        runs: their folders.
        host: the address to listen at.
        port: 0 lets the system choose.
        ready: called with the server once it listens.

    Raises:
        RunError: there is no such run, or the port can't be had.
        DistnormError: plotly or jinja2 isn't installed.
    """
    answers = Answers(follow([Path(run) for run in runs]))
    answers.page()  # what isn't installed, or can't be read, is said here and not to a browser
    try:
        server = Server(answers, host, port)
    except OSError as error:
        raise RunError(
            f"expected to listen at {host}, port {port}, found {error}; --port 0 takes a free one"
        ) from error
    with server:
        ready(server)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
