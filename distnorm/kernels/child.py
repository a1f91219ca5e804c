"""Running a compiler so that neither it nor its files outlive this process, however that ends."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

# A shell with a process group of its own waits for the compiler. Beside it, another waits until the pipe that
# nobody writes to ends, as it does with this process: then it ends the group, and removes the folder.
_SCRIPT = """
folder=$1
shift
exec 3<&0 </dev/null
(
    trap '' TERM
    read -r _ <&3
    kill -TERM 0
    rm -rf -- "$folder" || { sleep 1; rm -rf -- "$folder"; }
) >/dev/null 2>&1 &
watcher=$!
exec 3<&-
"$@"
code=$?
kill -KILL $watcher
exit $code
"""

_lock = Lock()
_running: set[subprocess.Popen[bytes]] = set()
_folders: set[Path] = set()
_ending: list[int] = []  # the process that is; a fork of it is not


class ProcessEndsError(Exception):
    """This process is ending: nothing new is begun."""


@contextmanager
def scratch(within: Path | None = None) -> Iterator[Path]:
    """A new folder that is removed on leaving it, and when this process ends.

    Raises:
        OSError: it can't be made.
    """
    with _lock:
        _require_time()
        folder = Path(tempfile.mkdtemp(dir=within))
        _folders.add(folder)
    owner = os.getpid()
    try:
        yield folder
    finally:
        if os.getpid() == owner:  # a fork may leave this, too
            with _lock:
                _folders.discard(folder)
            shutil.rmtree(folder, ignore_errors=True)


def run(command: Sequence[str], folder: Path, timeout: float) -> tuple[int, str]:
    """Run a compiler.

    Args:
        command: what to run; nothing is given to it to read.
        folder: for all its files, temporary ones too. It is removed if this process ends meanwhile.
        timeout: seconds.

    Returns:
        Its exit status, and what it said of errors.

    Raises:
        TimeoutError: it took longer, and was ended.
        OSError: it can't be run.
    """
    with _lock:  # no compiler starts behind the back of `_end_all`
        _require_time()
        process = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT, "sh", str(folder), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(folder)},
        )
        _running.add(process)
    assert process.stdin is not None and process.stderr is not None
    pipe, process.stdin = process.stdin, None  # `communicate` would close it
    try:
        said = process.communicate(timeout=timeout)[1]
    except subprocess.TimeoutExpired as error:
        raise TimeoutError from error
    finally:
        with _lock:
            _running.discard(process)
        if process.returncode is None:
            _end(process)
        pipe.close()
        process.stderr.close()
    return process.returncode, said.decode(errors="replace").strip()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of its group, and wait for it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _require_time() -> None:
    if os.getpid() in _ending:
        raise ProcessEndsError("the process is ending")


def _end_all() -> None:
    """As this process ends."""
    with _lock:
        _ending.append(os.getpid())
        for process in _running:
            _end(process)
        for folder in _folders:
            shutil.rmtree(folder, ignore_errors=True)


def _forget() -> None:
    """In a fork: what runs belongs to the process that started it."""
    global _lock
    _lock = Lock()
    _running.clear()
    _folders.clear()


atexit.register(_end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
