"""Where a framework is missing one test fails and says so, and the tests that need them are not collected."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

FRAMEWORKS = (
    "transformers",
    "accelerate",
    "peft",
    "trl",
    "lightning",
    "torchtitan",
    "ray",
    "megatron",
    "deepspeed",
)
MISSING = [name for name in FRAMEWORKS if find_spec(name) is None]
collect_ignore = [
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if MISSING and path.name not in ("test_common.py", "test_installed.py")
]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the ranks' server, where there is a rank to run."""
    if session.config.option.collectonly or MISSING:
        return
    if any("ranks" in getattr(item, "fixturenames", ()) for item in session.items):
        from tests.integrations import forked_server

        forked_server.start()
