"""The forms of the suite, and fixtures for all tests."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distnorm.plan import collectives
from distnorm.plan.group_state import GroupState
from distnorm.testing import RankPool

HERE = Path(__file__).parent
NOT_QUICK = [HERE / name for name in ("engines", "integrations", "monitor/test_report_page.py")]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--form",
        choices=("full", "quick", "rest"),
        default="full",
        help="quick: the tests that need neither frameworks nor a browser; rest: those that do; full: all",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What another form of the suite runs isn't even imported."""
    form = config.getoption("form")
    is_quick = not any(path in (collection_path, *collection_path.parents) for path in NOT_QUICK)
    left_out = not is_quick if form == "quick" else is_quick and collection_path.is_file()
    return True if form != "full" and left_out else None


def pytest_collection_finish() -> None:
    """What is there by now stays: collections, and plans, which search what is collectable, leave it out."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def ranks() -> Callable[..., list[Any]]:
    """`ranks(4, body, *args)` calls the module-level function `body` on 4 ranks; see `RankPool.run`.

    Several tests run at a time on every core, so that each may take as long as it likes, within a limit.
    """
    return partial(RankPool(max_ranks=8).run, timeout=180)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without a group knows nothing of the norms that a test before has planned."""
    monkeypatch.setattr(collectives, "_alone", GroupState())
