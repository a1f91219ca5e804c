"""`distnorm report`: runs to a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distnorm.errors import RunError
from distnorm.monitor.report.numbers import plural
from distnorm.monitor.report.page import write_page
from distnorm.monitor.report.runs import read_runs


def main(runs: Sequence[str | Path], output: str | Path) -> int:
    """Write one self-contained HTML page about runs, and compare them where there are several.

    Args:
        runs: their folders; layers.jsonl, alerts.jsonl and config.yaml are read where they are.
        output: the page's file; its folder exists.

    Returns:
        0.

    Raises:
        RunError: a run has no metrics, or the page can't be written.
        DistnormError: plotly isn't installed.
    """
    found = read_runs(runs)
    page = write_page(found).encode("utf-8")
    file = Path(output)
    draft = file.with_name(file.name + ".partial")
    try:
        draft.write_bytes(page)
        draft.replace(file)
    except OSError as error:
        raise RunError(f"expected to write the report to {file}, found {error}") from error
    said = "; ".join(
        f"{run.name}: {plural(len(run.steps.rows), 'step')}, {run.alerts_in_words}" for run in found
    )
    print(f"{file}: {len(page) / 1e6:.1f} MB; {said}")
    return 0
