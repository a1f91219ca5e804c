"""The rules by which layers and steps give alerts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distnorm.config import AlertsConfig
from distnorm.monitor.depth import trends
from distnorm.monitor.history import History
from distnorm.monitor.latch import Latch
from distnorm.monitor.records import Alert, Kind, LayerRow
from distnorm.monitor.report.numbers import short

# A layer can vanish under the bound only if it was so many times larger: a key's bias, whose gradient is zero
# but for rounding, never was.
_ALIVE = 1e3
# An expert that got no token has no gradient on that step, and is as alive as before.
_ZERO_STEPS = 3
_DEFAULT_FACTOR = 10.0


class AlertRules:
    """Remembers each layer's norms, and gives alerts.

    Args:
        config: the bounds.
    """

    def __init__(self, config: AlertsConfig) -> None:
        self._config = config
        self._latch = Latch(config.cooldown)
        self._layers: dict[str, History] = {}

    def clip_rate(self, step: int, rate: float) -> Iterator[Alert]:
        """Alerts of the share of clipped steps over a full window."""
        bound = self._config.clip_rate
        if bound is not None:
            beyond, back = rate > bound, rate <= bound / self._config.hysteresis
            text = f"{rate:.0%} of the window's steps were clipped, more than {bound:.0%}"
            yield from self._when_due("clip_rate", step, beyond, back, text, value=rate, bound=bound)

    def finite(
        self, step: int, finite: bool, norm: float | None, parameter: str | None, ranks: Sequence[int] | None
    ) -> Iterator[Alert]:
        """The alert of a norm that is inf or NaN, with parameter and ranks as far as they are known."""
        if finite:
            self._latch.release("non_finite")
        elif self._config.non_finite:
            text = f"the norm is {'inf or NaN' if norm is None else norm}{_on(ranks)}"
            yield from self._when_due(
                "non_finite", step, True, False, text, layer=parameter, ranks=ranks, value=norm
            )

    def layers(self, step: int, rows: Sequence[LayerRow]) -> Iterator[Alert]:
        """Alerts of a monitored step's layers."""
        factor = self._config.exploding or _DEFAULT_FACTOR
        for row in rows:
            history = self._layers.setdefault(row.layer, History())
            if math.isfinite(row.norm):
                yield from self._vanishing(step, row, history)
                yield from self._exploding(step, row, history)
            history.add(row.norm, factor, self._config.warmup)
        yield from self._falling(step, rows)

    def _vanishing(self, step: int, row: LayerRow, history: History) -> Iterator[Alert]:
        config = self._config
        bounds: dict[float, str] = {}
        if config.vanishing is not None and history.largest >= _ALIVE * config.vanishing:
            bounds[config.vanishing] = short(config.vanishing, 3)
        if config.drop is not None and history.count >= config.warmup:
            share = config.drop * history.average
            bounds[share] = f"{config.drop:g} of its average, {short(history.average)}"
        if not bounds:
            return
        bound = max(bounds)
        missing = row.norm == 0.0 and history.zeros + 1 < _ZERO_STEPS
        beyond, back = row.norm < bound and not missing, row.norm >= bound * config.hysteresis
        text = f"the gradient's norm is {short(row.norm)}, less than {bounds[bound]}"
        yield from self._when_due(
            "vanishing", step, beyond, back, text, layer=row.layer, value=row.norm, bound=bound
        )

    def _exploding(self, step: int, row: LayerRow, history: History) -> Iterator[Alert]:
        factor = self._config.exploding
        if factor is None or history.count < self._config.warmup:
            return
        bound = history.average * history.reach(factor)
        beyond, back = row.norm > bound, row.norm <= bound / self._config.hysteresis
        times = row.norm / history.average
        average = f"{short(times, 3)} times its average, {short(history.average)}"
        text = f"the gradient's norm is {short(row.norm)}, {average}"
        yield from self._when_due(
            "exploding", step, beyond, back, text, layer=row.layer, value=row.norm, bound=bound
        )

    def _falling(self, step: int, rows: Sequence[LayerRow]) -> Iterator[Alert]:
        bound = self._config.falling
        for trend in trends(rows) if bound is not None else ():
            assert bound is not None
            # The key is the kind of block, whichever of its ends is the low one.
            beyond, back = trend.ratio < bound, trend.ratio >= min(bound * self._config.hysteresis, 1.0)
            share = f"{short(trend.ratio, 3)}, less than {short(bound, 3)}"
            text = f"norms fall from {trend.high} to {trend.low} to {share}"
            yield from self._when_due(
                "vanishing",
                step,
                beyond,
                back,
                text,
                layer=trend.low,
                value=trend.ratio,
                bound=bound,
                of="depth ",
            )

    def diverged(self, step: int, layer: str | None, ranks: Sequence[int] | None) -> Iterator[Alert]:
        """The alert of replicas that differ: again after every cool-down for as long as they do."""
        text = f"replicas of the gradient differ bit by bit{_on(ranks)}"
        yield from self._when_due("divergence", step, True, True, text, layer=layer, ranks=ranks)

    def _when_due(
        self,
        kind: Kind,
        step: int,
        beyond: bool,
        back: bool,
        text: str,
        *,
        layer: str | None = None,
        ranks: Sequence[int] | None = None,
        value: float | None = None,
        bound: float | None = None,
        of: str = "",
    ) -> Iterator[Alert]:
        if self._latch.fires((kind, f"{of}{layer or ''}"), step, beyond=beyond, back=back):
            message = text if layer is None or of else f"{layer}: {text}"
            named = None if ranks is None else tuple(ranks)
            yield Alert(step, kind, layer, named, value, bound, message)

    def state_dict(self) -> dict[str, Any]:
        # No mapping: torch.distributed.checkpoint loads the keys of a mapping that are there already.
        layers = [[name, *history.state()] for name, history in self._layers.items()]
        return {"layers": layers, **self._latch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._layers = {name: History.of(numbers) for name, *numbers in state["layers"]}
        self._latch.load_state_dict(state)


def _on(ranks: Sequence[int] | None) -> str:
    if not ranks:
        return ""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f" on rank{'s' if len(ranks) > 1 else ''} {shown}"
