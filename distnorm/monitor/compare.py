"""`distnorm compare`: where the norms of two runs part. It needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distnorm.errors import RunError
from distnorm.monitor.records import METRICS_FILE

_COMPARED = ("grad_norm", "loss")


@dataclass(frozen=True, slots=True)
class StepPair:
    """One step of both runs."""

    step: int
    norms: tuple[float, float]
    losses: tuple[float, float]

    @property
    def norm_difference(self) -> float:
        return relative_difference(*self.norms)

    @property
    def loss_difference(self) -> float:
        return relative_difference(*self.losses)


def main(run_a: str | Path, run_b: str | Path, rtol: float | None = None) -> int:
    """Print both runs' norms and losses step by step, and the first step at which the norms part.

    Args:
        run_a: a run's folder, or its metrics file.
        run_b: the other's.
        rtol: the largest relative difference of norms that is still equal; `None` only prints the table.

    Returns:
        0, or with `rtol` 1 where the norms part or a run has steps that the other has not.

    Raises:
        RunError: a run can't be read, is empty, or has no step in common with the other.
    """
    a, b = _read(Path(run_a)), _read(Path(run_b))
    pairs = [StepPair(step, *zip(a[step], b[step], strict=True)) for step in sorted(a.keys() & b.keys())]
    if not pairs:
        raise RunError(
            f"expected runs with steps in common, found steps {_span(a)} in {run_a} and {_span(b)} in {run_b}"
        )
    print(_table(pairs))
    unmatched = _unmatched(run_a, run_b, a, b)
    for line in unmatched:
        print(line)
    if rtol is None:
        return 0
    parted = next((pair for pair in pairs if not pair.norm_difference <= rtol), None)
    print(_verdict(pairs, parted, rtol))
    return 1 if unmatched or parted is not None else 0


def relative_difference(a: float, b: float) -> float:
    """|a - b| over the larger magnitude; nan equals nan, and differs by inf from everything else."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    largest = max(abs(a), abs(b))
    return abs(a / largest - b / largest)


def _read(path: Path) -> Mapping[int, tuple[float, float]]:
    """Norm and loss of every step of a run."""
    file = path / METRICS_FILE if path.is_dir() else path
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"expected a run's folder or its {METRICS_FILE}, found {error}") from error
    rows: dict[int, tuple[float, float]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        step, norm, loss = _parse(line, f"{file}, line {number}")
        if step in rows:
            raise RunError(f"{file}, line {number}: expected each step once, found step {step} again")
        rows[step] = (norm, loss)
    if not rows:
        raise RunError(f"expected a row a step in {file}, found none")
    return rows


def _parse(line: str, where: str) -> tuple[int, float, float]:
    try:
        row = json.loads(line)
        norm, loss = (math.nan if row[key] is None else float(row[key]) for key in _COMPARED)
        return int(row["step"]), norm, loss
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{where}: expected JSON with numbers for step, {' and '.join(_COMPARED)}, found {line[:80]!r}"
        ) from error


def _table(pairs: Sequence[StepPair]) -> str:
    lines = [
        f"{'step':>6}  {'norm a':>18}  {'norm b':>18}  {'rel. diff.':>10}  "
        f"{'loss a':>18}  {'loss b':>18}  {'rel. diff.':>10}"
    ]
    lines += [
        f"{pair.step:>6}  {pair.norms[0]:>18.12g}  {pair.norms[1]:>18.12g}  {pair.norm_difference:>10.1e}  "
        f"{pair.losses[0]:>18.12g}  {pair.losses[1]:>18.12g}  {pair.loss_difference:>10.1e}"
        for pair in pairs
    ]
    return "\n".join(lines)


def _unmatched(
    run_a: str | Path, run_b: str | Path, a: Mapping[int, object], b: Mapping[int, object]
) -> list[str]:
    return [
        f"only in {run}: {len(steps)} step{'s' if len(steps) > 1 else ''}, {_span(steps)}"
        for run, steps in ((run_a, a.keys() - b.keys()), (run_b, b.keys() - a.keys()))
        if steps
    ]


def _span(steps: Mapping[int, object] | set[int]) -> str:
    first, last = min(steps), max(steps)
    return str(first) if first == last else f"{first} to {last}"


def _verdict(pairs: Sequence[StepPair], parted: StepPair | None, rtol: float) -> str:
    if parted is not None:
        a, b = parted.norms
        return (
            f"the norms part at step {parted.step}: {a!r} and {b!r}, "
            f"a relative difference of {parted.norm_difference:.1e} (at most {rtol:g} allowed)"
        )
    worst = max(pairs, key=lambda pair: pair.norm_difference)
    return (
        f"the norms agree within {rtol:g} in {len(pairs)} step{'s' if len(pairs) > 1 else ''}; "
        f"the largest difference is {worst.norm_difference:.1e}, at step {worst.step}"
    )
