"""The forms of the suite, and fixtures for all tests."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distnorm.plan import collectives
from distnorm.plan.group_state import GroupState
from distnorm.testing import RankPool
from tests.old_torch import limit_of_this_torch

HERE = Path(__file__).parent
NOT_QUICK = [HERE / name for name in ("engines", "integrations", "monitor/test_report_page.py")]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--form",
        choices=("full", "quick", "rest"),
        default="full",
        help="quick: tests that need neither frameworks nor a browser, nor much time; rest: the others",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What another form of the suite runs isn't even imported."""
    form = config.getoption("form")
    if form == "quick":
        return _needs_more(collection_path) or None
    if form == "rest" and collection_path.suffix == ".py" and not _needs_more(collection_path):
        return "mark.slow" not in collection_path.read_text(encoding="utf-8") or None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (form := config.getoption("form")) == "full":
        return
    of_form: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        is_quick = not _needs_more(item.path) and item.get_closest_marker("slow") is None
        of_form[is_quick == (form == "quick")].append(item)
    config.hook.pytest_deselected(items=of_form[False])
    items[:] = of_form[True]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    try:
        yield
    except Exception as error:
        if (reason := limit_of_this_torch(error)) is not None:
            pytest.skip(reason)
        raise


def _needs_more(path: Path) -> bool:
    """Whether it is in a folder or file of tests that need a framework or a browser."""
    return any(one in (path, *path.parents) for one in NOT_QUICK)


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
