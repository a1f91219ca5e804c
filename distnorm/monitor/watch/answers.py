"""What a page that follows runs asks for: itself, new rows, new text, and layers on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from typing import Any

from distnorm.monitor.report.columns import columns, thinned
from distnorm.monitor.report.page import Contents, as_json, environment, layer_figures, write_page
from distnorm.monitor.watch.follower import Follower


class Answers:
    """The answers, for any number of pages at a time.

    Args:
        followers: of the runs, in their order.
    """

    def __init__(self, followers: Sequence[Follower]) -> None:
        self._followers = followers
        self._lock, self._layers_lock = threading.Lock(), threading.Lock()
        self._contents: tuple[str, Contents] | None = None

    def page(self) -> str:
        """The whole page."""
        with self._lock:
            contents = self._refreshed()
            have = [[each.epoch, len(each.steps)] for each in self._followers]
            return write_page(contents.runs, live=True, more={"have": have, "shape": _shape(contents)})

    def rows(self, have: str) -> str:
        """The rows that a page hasn't got.

        Args:
            have: for each run its epoch and the number of its rows, "0.100,0.90".

        Raises:
            ValueError: it isn't that.
        """
        known = [tuple(int(number) for number in each.split(".")) for each in have.split(",")]
        if len(known) != len(self._followers) or any(len(each) != 2 for each in known):
            raise ValueError(f"expected a pair for each run, found {have!r}")
        with self._lock:
            for each in self._followers:
                each.refresh()
            stamp = " ".join(each.stamp() for each in self._followers)
            runs = [_new_rows(each, *pair) for each, pair in zip(self._followers, known, strict=True)]
        return as_json({"runs": runs, "stamp": stamp})

    def text(self, opened: Sequence[str]) -> str:
        """What is said in words, by the id of the element that says it.

        Args:
            opened: the figures whose tables are looked at.
        """
        with self._lock:
            contents = self._refreshed()
        macros: Any = environment().get_template("parts.html").module
        said: dict[str, str] = {}
        if contents.comparison is not None:
            said["in-figures"] = macros.table(contents.comparison.figures)
        for run in contents.sections:
            said[f"{run.key}-tiles"] = macros.tiles(run)
            said[f"{run.key}-notices"] = macros.notices(run.notices)
            said[f"{run.key}-alerts-text"] = macros.listed(run.alerts)
            said[f"{run.key}-skipped-text"] = macros.listed(run.skipped)
            if run.doctor is not None:
                said[f"{run.key}-doctor-text"] = macros.examined(run.doctor)
        says = {}
        for figure in contents.figures:
            says[f"{figure.id}-says"] = figure.chart.says
            if figure.chart.table is not None and figure.id in opened:
                said[f"{figure.id}-table"] = macros.table(figure.chart.table)
        return as_json(
            {"html": {key: str(html) for key, html in said.items()}, "words": says, "shape": _shape(contents)}
        )

    def layers(self, run: int) -> str:
        """The figures of a run's layers, with the HTML that they stand in.

        Raises:
            IndexError: there is no such run.
        """
        if run < 0:
            raise IndexError(run)
        follower = self._followers[run]
        with self._layers_lock:
            found = follower.run(with_layers=True)
        figures = layer_figures(found, f"run{run}")
        macros: Any = environment().get_template("parts.html").module
        html = "".join(str(macros.chart(figure, True)) for figure in figures)
        drawn = [figure.as_data() for figure in figures if figure.chart.is_drawn]
        words = {f"{figure.id}-says": figure.chart.says for figure in figures}
        tables = {figure.id: str(macros.table(of)) for figure in figures if (of := figure.chart.table)}
        return as_json({"html": html, "figures": drawn, "words": words, "tables": tables})

    def _refreshed(self) -> Contents:
        for each in self._followers:
            each.refresh()
        stamp = " ".join(each.stamp() for each in self._followers)
        if self._contents is None or self._contents[0] != stamp:
            self._contents = stamp, Contents([each.run() for each in self._followers], live=True)
        return self._contents[1]


def _new_rows(follower: Follower, epoch: int, count: int) -> dict[str, Any]:
    steps = follower.steps
    answer: dict[str, Any] = {"epoch": follower.epoch, "count": len(steps)}
    if epoch == follower.epoch and count == len(steps):
        return answer
    goes_on = epoch == follower.epoch and 0 <= count < len(steps)
    (kept,) = thinned([steps[count:] if goes_on else steps])
    return {**answer, "columns": columns(kept), "replace": not goes_on}


def _shape(contents: Contents) -> str:
    """What charts and lines there are: a page of others has to be loaded again."""
    figures = [
        (
            figure.id,
            figure.chart.title,
            figure.chart.axis,
            [(line.column, line.marks) for line in figure.chart.lines],
        )
        for figure in contents.figures
    ]
    parts = [(run.ends is not None, run.doctor is not None) for run in contents.sections]
    return hashlib.sha256(json.dumps([figures, parts]).encode()).hexdigest()[:16]
