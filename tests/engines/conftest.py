"""Engine tests: their ranks have DeepSpeed imported, and a table of all cells ends the run."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distnorm import testing

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
# The last two import torch's compiler, 10 s of a rank's time where nobody has done so before.
PRELOAD = (
    "deepspeed",
    "deepspeed.pipe",
    "deepspeed.moe.layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)
TABLE = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "engines: on DeepSpeed's engines (needs the deepspeed extra)")
    config.stash[TABLE] = []


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [i for i in items if Path(__file__).parent in i.path.parents and "deepspeed" in i.path.name]
    for item in here:
        item.add_marker(pytest.mark.engines)
        if not HAS_DEEPSPEED:
            item.add_marker(pytest.mark.skip(reason="needs DeepSpeed: pip install distnorm[deepspeed]"))
    if here and HAS_DEEPSPEED:
        # Before any test has started the pool's server: imports in it are shared by all ranks.
        os.environ["DS_ACCELERATOR"] = "cpu"
        testing.preload(*PRELOAD)


@pytest.fixture(scope="session")
def engine_ranks() -> Callable[..., list[Any]]:
    """As the fixture `ranks`."""
    return testing.RankPool(max_ranks=4).run


@pytest.fixture
def table(request: pytest.FixtureRequest) -> list[str]:
    """Lines that are printed when all tests are over."""
    return request.config.stash[TABLE]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(TABLE, []):
        terminalreporter.section("engines: norm and update against the dense oracle")
        for line in lines:
            terminalreporter.write_line(line)
