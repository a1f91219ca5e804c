"""`distnorm suggest-threshold`: what a constant threshold would have done to a run."""

from __future__ import annotations

from pathlib import Path

from distnorm.errors import RunError
from distnorm.monitor.report.numbers import percentile, plural
from distnorm.monitor.report.steps import read_steps

PERCENTS = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 100.0)


def main(run: str | Path) -> int:
    """Print percentiles of a run's norms before clipping, each with the clip rate that it would have given.

    A step is clipped where torch's coefficient, max_norm / (norm + 1e-6), is under 1. Steps whose norm is not
    finite are counted, and left out.

    Args:
        run: a run's folder, or its metrics file.

    Returns:
        0.

    Raises:
        RunError: the run has no metrics, or no step with a finite norm.
    """
    steps = read_steps(Path(run))
    based = [step for step in steps.rows if step.finite]
    out = len(steps.rows) - len(based)
    if not based:
        raise RunError(
            f"expected steps with finite norms in {run}, found {plural(out, 'step')}, none of them finite"
        )
    norms = sorted(step.norm for step in based)
    print(f"{plural(len(based), 'step')}, {based[0].step} to {based[-1].step}, norms before clipping")
    print(f"left out: {plural(out, 'step')} whose norm is not finite")
    for note in steps.notes:
        print(note)
    print(f"\n{'percentile':>10}  {'max_norm':>12}  {'clip rate':>9}  {'steps':>9}")
    for percent in PERCENTS:
        threshold = percentile(norms, percent)
        clipped = sum(threshold / (norm + 1e-6) < 1 for norm in norms)
        name = "max" if percent == 100 else f"{percent:g}"
        print(f"{name:>10}  {threshold:>12.6g}  {clipped / len(norms):>9.2%}  {clipped:>9,}")
    print("\nA step whose norm is the threshold counts, for torch's coefficient is max_norm / (norm + 1e-6).")
    given = sum(step.clipped for step in based)
    print(f"The run itself clipped {given:,} of them, {given / len(norms):.2%}.")
    return 0
