"""Every error the library raises on purpose.

All kinds derive from `DistnormError`, so one ``except`` clause catches them. A kind that has a
natural built-in counterpart derives from that as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = [
    "ConfigError",
    "CoverageError",
    "DisagreementError",
    "DistnormError",
    "LostRankError",
    "NonFiniteGradientError",
    "Problem",
    "ReplicaError",
    "RunError",
    "UnsupportedGradientError",
]


class DistnormError(Exception):
    """Base of every error that distnorm raises on purpose."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a configuration.

    Args:
        file: the file's name; for an override the variable's name or the ``--set`` expression; ``<config>``
            for a configuration given in code.
        line: counted from 1; None where there is no file.
        column: counted from 1, in characters; None where there is no file.
        path: the key's dotted path, such as ``clip.max_norm``; empty for the document as a whole.
        message: what is wrong: what was expected and what was found.
    """

    file: str
    line: int | None
    column: int | None
    path: str
    message: str

    def __str__(self) -> str:
        """``file:line:column: path: message`` in one line, without the parts that are absent."""
        place = self.file if self.line is None else f"{self.file}:{self.line}:{self.column}"
        text = ": ".join(part for part in (place, self.path, self.message) if part)
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class ConfigError(DistnormError, ValueError):
    """The configuration is wrong; `problems` holds every mistake that was found, in order of position."""

    problems: tuple[Problem, ...]

    def __init__(self, message: str, problems: tuple[Problem, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


class CoverageError(DistnormError):
    """An element of the global gradient would be counted never, or more than once."""


class ReplicaError(DistnormError):
    """Gradients that must be equal on every replica differ."""


class DisagreementError(DistnormError):
    """Ranks disagree about something that they must all hold alike, such as the plan or the norm."""


class UnsupportedGradientError(DistnormError):
    """A gradient has a layout, placement or dtype that cannot be reduced exactly."""


class LostRankError(DistnormError, RuntimeError):
    """A rank did not come to a collective in time, or the network lost it; `missing` has those that gave no
    sign afterwards.

    It stands in place of what torch raises. The process group is of no further use.
    """

    exit_code = 1
    missing: tuple[int, ...]

    def __init__(self, message: str, missing: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing


class NonFiniteGradientError(DistnormError, RuntimeError):
    """The total norm is inf or NaN and the configuration asks to raise; `total_norm` says which.

    `where` has the first few parameters of each rank whose gradient isn't finite, with that rank.
    """

    total_norm: float
    where: tuple[tuple[str, int], ...]

    def __init__(
        self, message: str, total_norm: float = math.nan, where: tuple[tuple[str, int], ...] = ()
    ) -> None:
        super().__init__(message)
        self.total_norm, self.where = total_norm, where


class RunError(DistnormError):
    """A training run cannot start, resume or be read back."""
