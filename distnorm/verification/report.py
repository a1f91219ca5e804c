"""What verify found, alike on every rank."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

_WIDTH = 110


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked: its name, whether it holds, and what was expected and found."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `distnorm.verify` found; the same on every rank. `str(report)` is for people.

    Args:
        norm_type: order p of the norms.
        ranks: number of ranks that took part.
        parameters: number of parameters of the whole model.
        elements: number of elements they have, each counted once.
        true_norm: norm of the whole gradient, in fp64, apart from the library's fast path.
        measured_norm: the number that was judged: the caller's where one was handed in, else
            `GradClipper`'s; `None` where that refused to measure.
        checks: every check, in order.
    """

    norm_type: float
    ranks: int
    parameters: int
    elements: int
    true_norm: float
    measured_norm: float | None
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        failed = sum(not check.ok for check in self.checks)
        verdict = "verified" if self.ok else f"{failed} of {len(self.checks)} checks FAILED"
        measured = "none" if self.measured_norm is None else f"{self.measured_norm!r}"
        lines = [
            f"gradient norm {verdict} on {self.ranks} rank{'s' if self.ranks > 1 else ''} "
            f"(p = {self.norm_type:g}, {self.parameters} parameters, {self.elements:,} elements)",
            f"  true norm      {self.true_norm!r}",
            f"  measured norm  {measured}",
        ]
        indent = max(len(check.name) for check in self.checks) + 8
        for check in self.checks:
            head = f"  {'ok  ' if check.ok else 'FAIL'}  {check.name}".ljust(indent + 2)
            lines += _wrapped(head, check.detail)
        return "\n".join(lines)


def _wrapped(head: str, detail: str) -> list[str]:
    lines: list[str] = []
    for part in detail.splitlines():
        lead = head if not lines else " " * len(head)
        lines += textwrap.wrap(
            part,
            _WIDTH,
            initial_indent=lead,
            subsequent_indent=" " * len(head),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines or [head]
