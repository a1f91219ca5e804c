"""Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distnorm.monitor.records import Alert, LayerRow, scalars

# Seconds for which a person may be asked for a key; training waits.
_LOGIN = 30


class WandbSink:
    """Metrics `distnorm/<key>`, `distnorm/groups/<group>/<key>`, `distnorm/layers/<number>/<layer>`; alerts.

    Args:
        folder: where a run of its own writes; None: wandb's default.
    """

    def __init__(self, folder: Path | None) -> None:
        import wandb

        self._own = wandb.run is None
        self._run: Any = wandb.run or wandb.init(
            project=os.environ.get("WANDB_PROJECT", "distnorm"),
            dir=None if folder is None else str(folder),
            settings=wandb.Settings(login_timeout=_LOGIN),
        )
        # An axis of its own: the user's own logging may count steps otherwise, and W&B's must never go back.
        self._run.define_metric("distnorm/*", step_metric="distnorm/step")

    def step(self, row: Mapping[str, Any]) -> None:
        self._log(
            row["step"],
            ((key if group is None else f"groups/{group}/{key}", v) for key, group, v in scalars(row)),
        )

    def layers(self, step: int, rows: Sequence[LayerRow]) -> None:
        self._log(
            step, ((f"layers/{key}/{row.layer}", v) for row in rows for key, v in row.numbers().items())
        )

    def _log(self, step: int, values: Iterable[tuple[str, float]]) -> None:
        self._run.log({"distnorm/step": step, **{f"distnorm/{key}": value for key, value in values}})

    def alert(self, alert: Alert) -> None:
        self._run.alert(
            title=f"distnorm: {alert.kind}", text=f"step {alert.step}: {alert.message}", level="WARN"
        )

    def close(self) -> None:
        if self._own:
            self._run.finish()
