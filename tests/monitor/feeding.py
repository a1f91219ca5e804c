"""Values as a run would hand them to a monitor."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distnorm import Alert, LayerRow, Monitor
from distnorm.config import MonitorConfig


def step_row(step: int, clipped: bool = False, norm: float = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 2.5,
        "grad_norm": norm,
        "clip_coef": 0.5 if clipped else 1.0,
        "clipped_norm": norm / 2 if clipped else norm,
        "threshold": 0.5,
        "clipped": clipped,
        "finite": math.isfinite(norm),
        "tokens_per_second": 1000.0,
        **more,
    }


def layer_row(layer: str, norm: float) -> LayerRow:
    return LayerRow(layer, norm, norm / 8, norm / 2, 0.25 if norm else 1.0, norm / 3)


def monitored(config: Mapping[str, Any], folder: Path | None = None) -> tuple[Monitor, list[Alert]]:
    """A monitor of the config, and the alerts that it will have given."""
    monitor = Monitor(MonitorConfig(**config), folder)
    alerts: list[Alert] = []
    monitor.on_alert(alerts.append)
    return monitor, alerts


def ordinary(seed: int, steps: int, every: int) -> Iterator[tuple[int, dict[str, float]]]:
    """A clean run's norms: they fall by ten and vary by three, late starters, what has no gradient."""
    rng = random.Random(seed)
    for step in range(every, steps + 1, every):
        level = 0.1 + 0.9 * math.exp(-step / 40)
        norms = {
            f"blocks.{block}.{name}.weight": size * level * math.exp(rng.uniform(-1, 1) * math.log(3))
            for block in range(6)
            for name, size in (("attn", 1.0), ("mlp", 3.0), ("norm", 0.02))
        }
        # Before an output projection that begins as zero nothing has a gradient on the first steps.
        norms["adapter.weight"] = 0.0 if step <= 3 * every else level * min(1.0, step / 50) ** 2
        norms["adapter.late"] = 0.0 if step <= steps / 2 else level
        # Each expert gets no token now and then, but not in three monitored steps in a row.
        norms["expert.weight"] = 0.0 if step // every % 3 else level * math.exp(rng.uniform(-1, 1))
        # A key's bias has no gradient but for rounding: it is anywhere around the bound.
        norms["attn.k.bias"] = 1e-9 * level * 10 ** rng.uniform(-1, 1.5)
        norms["unused"] = 0.0
        yield step, norms
