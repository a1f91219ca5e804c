"""Runs that are followed in a terminal, as over ssh: lines of braille, newest numbers, newest alerts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from distnorm.errors import DistnormError
from distnorm.monitor.report.numbers import finite, short, visible
from distnorm.monitor.report.runs import Run
from distnorm.monitor.report.steps import Step
from distnorm.monitor.report.summary import facts
from distnorm.monitor.watch.follower import Follower, follow

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_EVERY = 1.0
_HEIGHT, _NARROWEST, _MOST_ALERTS = 6, 36, 5
_BRAILLE = 0x2800
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""The dots of a braille cell by row and column, as Unicode numbers them."""
_CHARTS: tuple[tuple[str, str, bool, str], ...] = (
    ("gradient norm", "norm", True, "blue"),
    ("loss", "loss", False, "green"),
    ("learning rate", "learning_rate", False, "yellow"),
    ("tokens/s", "tokens_per_second", False, "cyan"),
    ("clip rate", "clip_rate", False, "magenta"),
)


def main(paths: Sequence[Path]) -> int:
    """Draw until Ctrl-C; where standard output is no terminal, once.

    Raises:
        RunError: there is no such run.
        DistnormError: rich isn't installed.
    """
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError as error:
        raise DistnormError(
            "--terminal draws with rich, which is not installed: pip install 'distnorm[rich]'"
        ) from error
    followers = follow(list(paths))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.print(frame(followers, console))
        return 0
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(frame(followers, console), refresh=True)
                time.sleep(_EVERY)
    except KeyboardInterrupt:
        return 0


def frame(followers: Sequence[Follower], console: Console) -> RenderableType:
    """All runs as they are now, one below the other."""
    from rich.console import Group

    for each in followers:
        each.refresh()
    return Group(*(_screen(each.run(), console.width) for each in followers))


def _screen(run: Run, width: int) -> RenderableType:
    from rich.columns import Columns
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    steps = run.steps.rows
    inner = width - 4
    abreast = max(1, min(3, inner // (_NARROWEST + 4)))
    size = inner // abreast - 5
    charts = [
        Panel(
            Text("\n".join(plot(values, size, _HEIGHT, log=log)), style=colour), title=title, width=size + 4
        )
        for title, column, log, colour in _CHARTS
        if finite(values := [float(getattr(step, column)) for step in steps])
    ]
    said = "   ".join(f"{word.lower()} {value}" for word, value in facts(run))
    parts: list[RenderableType] = [Text(visible(f"{_age(steps)}   {said}"))]
    if run.starts and run.starts[-1].commit:
        parts.append(Text(visible(f"commit {run.starts[-1].commit}"), style="dim"))
    if run.remarks:
        parts.append(Text(visible(run.remarks.strip().partition("\n")[0]), style="italic"))
    for alert in run.alerts[-_MOST_ALERTS:]:
        message = visible(alert.message.replace("\n", " "))
        parts.append(
            Text(f"step {alert.step:,}  {visible(alert.kind)}  {message}", style="red", overflow="ellipsis")
        )
    # Last, since a low terminal cuts the end.
    return Panel(Group(*parts, Columns(charts)), title=Text(visible(run.name)))


def _age(steps: Sequence[Step]) -> str:
    if not steps:
        return "no step yet"
    seconds = time.time() - steps[-1].time
    if math.isnan(seconds):
        return f"step {steps[-1].step:,}"
    units = (("days", 86400), ("hours", 3600), ("min", 60), ("s", 1))
    unit, size = next((each for each in units if seconds >= 2 * each[1]), units[-1])
    return f"step {steps[-1].step:,}, {seconds / size:.0f} {unit} ago"


def plot(values: Sequence[float], width: int, height: int, *, log: bool) -> list[str]:
    """Values as a line of braille dots between its lowest and highest, which stand at its left.

    Args:
        values: in order; those that aren't finite, or not above zero where `log`, are gaps.
        width: characters, with the numbers.
        height: lines.
        log: whether the axis is logarithmic; not where all values are zero.
    """
    log = log and any(0 < value < math.inf for value in values)
    at: Callable[[float], float] = math.log if log else float

    def is_drawn(value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not log)

    sound = list(filter(is_drawn, values))
    low, high = min(sound), max(sound)
    form = short if high - low > 1e-9 * abs(high) else (lambda value: short(value, 6))
    labels = [form(high), *[""] * (height - 2), form(low)]
    margin = max(map(len, labels))
    columns, rows = 2 * max(1, width - margin - 1), 4 * height
    scale = (rows - 1) / ((at(high) - at(low)) or math.inf)
    cells = [[0] * (columns // 2) for _ in range(height)]
    previous: tuple[int, int] | None = None
    for column, (start, end) in enumerate(pairwise(n * len(values) // columns for n in range(columns + 1))):
        # Where there are fewer values than dots, each is a step of the line.
        inside = [value for value in values[start : max(end, start + 1)] if is_drawn(value)]
        if not inside:
            previous = None
            continue
        ends = [rows - 1 - round((at(value) - at(low)) * scale) for value in (max(inside), min(inside))]
        top, bottom = ends
        if previous is not None:  # meet the column before
            top, bottom = min(top, previous[1]), max(bottom, previous[0])
        for row in range(top, bottom + 1):
            cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
        previous = (ends[0], ends[1])
    lines = ["".join(chr(_BRAILLE + cell) for cell in line) for line in cells]
    return [f"{label:>{margin}} {line}" for label, line in zip(labels, lines, strict=True)]
