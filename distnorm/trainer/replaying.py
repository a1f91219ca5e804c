"""A suspicious step is computed again: the same bits, or the rank and the parameter where they differ."""

from __future__ import annotations

import json
import math
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch

from distnorm import GradClipper, replay
from distnorm.trainer.world import World

_STEPS, _WARM_UP = 50, 5
FILE = "replays.jsonl"


class Replays:
    """Replays steps whose norm is not finite, or far above those before.

    Args:
        world: the ranks.
        clipper: with ``monitor.fingerprints``.
        factor: a norm is suspicious above so many times the mean of those before; `None` for no such bound.
        folder: of the run.
    """

    def __init__(self, world: World, clipper: GradClipper, factor: float | None, folder: str) -> None:
        self._world, self._clipper, self._factor, self._folder = world, clipper, factor, Path(folder)
        self._norms: deque[float] = deque(maxlen=_STEPS)

    def after(self, step: int, norm: float, compute: Callable[[], object]) -> list[tuple[int, str]] | None:
        """See to a step that was clipped, before the optimizer's. Collective, with one norm on all ranks.

        Args:
            step: its number.
            norm: its total norm.
            compute: fills the gradients again; those that are there now are put back.

        Returns:
            Rank and parameter of each gradient that differs; `None` where nothing was suspicious.
        """
        reason = self._reason(norm)
        if reason is None:
            self._norms.append(norm)
            return None
        held = [(p, p.grad) for p in self._clipper.parameters]
        for parameter, _ in held:
            parameter.grad = None
        try:
            found = replay(self._clipper, compute)
        finally:
            with torch.no_grad():
                for parameter, gradient in held:
                    parameter.grad = None
                    parameter.grad = gradient
        self._report(step, reason, found)
        return found

    def _reason(self, norm: float) -> str | None:
        if not math.isfinite(norm):
            return f"the norm is {norm:g}"
        usual = mean(self._norms) if len(self._norms) >= _WARM_UP else math.inf
        if self._factor is not None and norm > self._factor * usual:
            times, count = norm / usual, len(self._norms)
            return f"the norm is {norm:.4g}, {times:.3g} times the mean of the {count} before"
        return None

    def _report(self, step: int, reason: str, found: list[tuple[int, str]]) -> None:
        if self._world.rank != 0:
            return
        row = {"step": step, "reason": reason, "differing": [{"rank": r, "parameter": n} for r, n in found]}
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        what = ", ".join(f"'{name}' on rank {rank}" for rank, name in found[:8])
        what = f"computes otherwise the second time: {what}" if found else "has the same bits the second time"
        print(f"step {step}: {reason}; replayed, it {what}", file=sys.stderr, flush=True)
