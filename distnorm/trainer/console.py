"""What the trainer prints while it trains."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any


class Console:
    """A line a step, and the base of what prints otherwise.

    Args:
        done: steps made before.
        steps: the last step.
    """

    def __init__(self, done: int, steps: int) -> None:
        self.done, self.steps = done, steps

    def row(self, row: Mapping[str, Any]) -> None:
        """A step's metrics."""
        self.say(f"step {row['step']:>{len(str(self.steps))}}/{self.steps}  {_numbers(row)}")

    def say(self, text: str) -> None:
        """A line of text."""
        print(text, flush=True)

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Silence(Console):
    """Prints nothing, as every rank but the first."""

    def say(self, text: str) -> None:
        pass


class Bar(Console):
    """A bar of rich's, with the newest step's metrics and the time that is left."""

    def __init__(self, done: int, steps: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        super().__init__(done, steps)
        # Where a terminal is narrow, the end of the text is cut, not the step or the loss.
        text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
        self._progress = Progress(text, BarColumn(bar_width=10), TimeRemainingColumn(compact=True))
        self._task = self._progress.add_task(f"{done}/{steps}", completed=done, total=steps)

    def row(self, row: Mapping[str, Any]) -> None:
        text = f"{row['step']}/{self.steps}  {_numbers(row).replace('coefficient', 'coef')}"
        self._progress.update(self._task, completed=row["step"], description=text)

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Console:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


def open_console(mode: str, done: int, steps: int, *, quiet: bool) -> Console:
    """The console of a run.

    Args:
        mode: plain, rich, or auto: rich where standard output is a terminal, if it is installed.
        done: steps made before.
        steps: the last step.
        quiet: whether to print nothing.
    """
    if quiet:
        return Silence(done, steps)
    if mode == "plain" or (mode == "auto" and not sys.stdout.isatty()):
        return Console(done, steps)
    try:
        return Bar(done, steps)
    except ImportError:
        console = Console(done, steps)
        if mode == "rich":
            console.say(
                "monitor.console: rich is not installed, so a line a step; pip install 'distnorm[rich]'"
            )
        return console


def _numbers(row: Mapping[str, Any]) -> str:
    return (
        f"loss {row['loss']:.4f}  grad norm {row['grad_norm']:.4f}  coefficient {row['clip_coef']:.4f}  "
        f"{row['tokens_per_second']:,.0f} tokens/s"
    )
