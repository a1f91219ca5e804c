"""The ranks' server as a fork of the process that collects the tests, not a second one that imports all anew.

The frameworks cost twenty seconds of a core to import, and each of pytest's processes has a server.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import warnings
from collections.abc import Sequence
from multiprocessing import forkserver, get_context, resource_tracker, util
from typing import NoReturn
from unittest import mock

from distnorm import testing


def start() -> None:
    """Import what ranks need, and start their server, before any test has changed anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the frameworks' own, and of forks beside execnet's threads
        for name in testing._preloaded:
            importlib.import_module(name)
        get_context("forkserver").set_forkserver_preload(testing._preloaded)
        resource_tracker.ensure_running()  # not by a fork
        with mock.patch.object(util, "spawnv_passfds", _fork):
            forkserver.ensure_running()


def _fork(path: object, arguments: Sequence[bytes | str], descriptors: Sequence[int]) -> int:
    """Stands in for `spawnv_passfds`: runs the same code, in a fork."""
    return os.fork() or _serve(str(arguments[-1]), descriptors)


def _serve(code: str, descriptors: Sequence[int]) -> NoReturn:
    try:
        faulthandler.disable()  # it holds a descriptor that is closed now
        begin = 0
        for kept in sorted({0, 1, 2, *descriptors}):
            os.closerange(begin, kept)
            begin = kept + 1
        os.closerange(begin, os.sysconf("SC_OPEN_MAX"))
        warnings.resetwarnings()  # pytest's
        forkserver._forkserver.__init__()  # type: ignore[misc]  # its lock is held
        with contextlib.suppress(SystemExit):
            exec(code, {})
    finally:
        os._exit(0)
