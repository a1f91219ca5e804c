"""The layers of a run: its layers.jsonl as a grid of layers x bins of steps, and each layer's spread."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from distnorm.monitor.report.numbers import number, percentiles, step_number
from distnorm.monitor.report.row_reader import Row, UnreadableLines, leads_out, read_rows

PERCENTS = (0, 5, 25, 50, 75, 95, 100)
_MAX_ROWS, _MAX_COLUMNS = 1000, 400


@dataclass(frozen=True, slots=True)
class GridLayer:
    """One layer, or several neighbours where there are too many to tell apart.

    Args:
        name: the layer's, or the first's and the last's.
        cells: for each bin the geometric mean of the norms that are positive and finite; nan of none.
        zeros: bins in which every finite norm is zero.
        broken: bins with a norm that is not finite.
        spread: `PERCENTS` of the finite norms of all steps.
        last: the last row.
    """

    name: str
    cells: tuple[float, ...]
    zeros: tuple[int, ...]
    broken: tuple[int, ...]
    spread: tuple[float, ...]
    last: Row


@dataclass(frozen=True, slots=True)
class LayerGrid:
    """All layers in the order of the model; `bins` are the first and last step of each column."""

    layers: tuple[GridLayer, ...] = ()
    bins: tuple[tuple[int, int], ...] = ()
    steps: int = 0
    rows: int = 0
    merged: int = 1
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class _Series:
    names: list[str]
    steps: array[int] = field(default_factory=lambda: array("q"))
    norms: array[float] = field(default_factory=lambda: array("d"))
    last: Row = field(default_factory=dict)
    line: int = 0  # of the last row


def read_layers(file: Path, max_cells: int) -> LayerGrid:
    """The layers in `file`; none where there is no such file, or a link out of its folder.

    Args:
        file: layers.jsonl.
        max_cells: the grid has at most so many cells, unless there are more layers than that.
    """
    if not file.is_file() or leads_out(file):
        return LayerGrid()
    broken, found = UnreadableLines(file.name), LayerRows()
    for rows in read_rows(file, broken):
        for line, row in rows:
            if not found.add(line, row):
                broken.add(line)
    return found.grid(max_cells, (str(broken),) if broken.count else ())


class LayerRows:
    """Rows of layers, which may go on to grow."""

    def __init__(self) -> None:
        self._series: dict[str, _Series] = {}

    def add(self, line: int, row: Row) -> bool:
        """Take in the row of a line; says whether it is one."""
        try:
            name, step, norm = row["layer"], step_number(row["step"]), row["norm"]
            if type(norm) is not float:
                norm = number(norm)
            of = self._series.get(name) or self._series.setdefault(str(name), _Series([str(name)]))
            of.steps.append(step)
            of.norms.append(norm)
        except (KeyError, ValueError, TypeError, OverflowError):
            return False
        of.last, of.line = row, line
        return True

    def grid(self, max_cells: int, notes: tuple[str, ...] = ()) -> LayerGrid:
        """The layers as `read_layers` gives them."""
        return _grid(_in_order(list(self._series.values())), max_cells, notes)


def _in_order(all_series: list[_Series]) -> list[_Series]:
    """The order of the newest step's rows, which is that of the model; then the layers that it lacks."""
    newest = max((of.steps[-1] for of in all_series), default=0)
    return sorted(all_series, key=lambda of: of.line if of.steps[-1] == newest else math.inf)


def _grid(all_series: Sequence[_Series], max_cells: int, notes: tuple[str, ...]) -> LayerGrid:
    rows = sum(len(of.steps) for of in all_series)
    together = -(-len(all_series) // _MAX_ROWS) or 1
    merged = [_merge(all_series[first : first + together]) for first in range(0, len(all_series), together)]
    steps = sorted(set().union(*(of.steps for of in all_series)))
    columns = max(1, min(len(steps), _MAX_COLUMNS, max_cells // max(1, len(merged))))
    edges = [place * len(steps) // columns for place in range(columns + 1)]
    ends = list(pairwise(edges)) if steps else []
    bins = tuple((steps[a], steps[b - 1]) for a, b in ends)
    column = {step: index for index, (a, b) in enumerate(ends) for step in steps[a:b]}
    layers = tuple(_layer(of, column, len(bins)) for of in merged)
    return LayerGrid(layers, bins, len(steps), rows, together, notes)


def _merge(neighbours: Sequence[_Series]) -> _Series:
    if len(neighbours) == 1:
        return neighbours[0]
    together = _Series([name for of in neighbours for name in of.names], last=neighbours[-1].last)
    for of in neighbours:
        together.steps.extend(of.steps)
        together.norms.extend(of.norms)
    return together


def _layer(of: _Series, column: dict[int, int], columns: int) -> GridLayer:
    sums, counts = [0.0] * columns, [0] * columns
    zeros, broken = set(), set()
    log = math.log
    for step, norm in zip(of.steps, of.norms, strict=True):
        place = column[step]
        if 0.0 < norm < math.inf:
            sums[place] += log(norm)
            counts[place] += 1
        elif norm == 0.0:
            zeros.add(place)
        else:
            broken.add(place)
    cells = tuple(math.exp(a / n) if n else math.nan for a, n in zip(sums, counts, strict=True))
    name = of.names[0] if len(of.names) == 1 else f"{of.names[0]} … {of.names[-1]} ({len(of.names)} layers)"
    only_zero = tuple(sorted(place for place in zeros - broken if not counts[place]))
    return GridLayer(name, cells, only_zero, tuple(sorted(broken)), percentiles(of.norms, PERCENTS), of.last)
