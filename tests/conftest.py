"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from distnorm.plan import collectives
from distnorm.testing import RankPool


@pytest.fixture(scope="session")
def ranks() -> Callable[..., list[Any]]:
    """`ranks(4, body, *args)` calls the module-level function `body` on 4 ranks; see `RankPool.run`."""
    return RankPool(max_ranks=8).run


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without a group knows nothing of the norms that a test before has planned."""
    monkeypatch.setattr(collectives, "_alone", collectives.GroupState())
