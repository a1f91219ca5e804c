"""Loading texts as files, and finding what was wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from distnorm.config import Config, load_config
from distnorm.errors import ConfigError, Problem

Place = tuple[int | None, int | None, str]

# A file is written anew in every example, so that all examples may share its folder.
EXAMPLES = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def load(file: Path, text: str, *overrides: str) -> Config:
    file.write_bytes(text.encode("utf-8"))
    return load_config(file, overrides)


def problems(file: Path, text: str, *overrides: str) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        load(file, text, *overrides)
    return caught.value.problems


def only(found: tuple[Problem, ...]) -> Problem:
    assert len(found) == 1, found
    return found[0]


def places(found: tuple[Problem, ...]) -> list[Place]:
    return [(problem.line, problem.column, problem.path) for problem in found]
