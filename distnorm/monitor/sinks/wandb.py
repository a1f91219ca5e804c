"""Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distnorm.monitor.records import Alert, LayerRow, scalars

# Seconds for which a person may be asked for a key; training waits.
_LOGIN = 30


class WandbSink:
    """Metrics `step/<key>`, `<group>/<key>` and `layer <number>/<layer>` over `distnorm_step`, and its alerts.

    Args:
        folder: where a run of its own writes; None: where wandb does by itself.
    """

    def __init__(self, folder: Path | None) -> None:
        import wandb

        self._own = wandb.run is None
        if wandb.run is None:
            settings = wandb.Settings(login_timeout=_LOGIN)
            where = None if folder is None else str(folder)
            project = settings.project or "distnorm"
            self._run: Any = wandb.init(project=project, dir=where, settings=settings)
        else:
            self._run = wandb.run
        # A step of its own: the user's own logging may count otherwise, and W&B's must never go back.
        self._run.define_metric("distnorm_step")
        for section in ("step", *(f"layer {name}" for name in ("norm", "rms", "max"))):
            self._run.define_metric(f"{section}/*", step_metric="distnorm_step")

    def step(self, row: Mapping[str, Any]) -> None:
        numbers = {f"{group or 'step'}/{key}": value for key, group, value in scalars(row)}
        self._run.log({"distnorm_step": row["step"], **numbers})

    def layers(self, step: int, rows: Sequence[LayerRow]) -> None:
        numbers = {f"layer {key}/{row.layer}": value for row in rows for key, value in row.numbers().items()}
        self._run.log({"distnorm_step": step, **numbers})

    def alert(self, alert: Alert) -> None:
        self._run.alert(title=f"distnorm: {alert.kind}", text=f"step {alert.step}: {alert.message}", level="WARN")

    def close(self) -> None:
        if self._own:
            self._run.finish()
