"""Prometheus scrapes rank 0."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from distnorm.monitor.records import Alert, LayerRow, scalars


class PrometheusSink:
    """Gauges in a registry of its own, over HTTP.

    `distnorm_<key>` are the numbers of the newest row, `distnorm_group_<key>{group}` those of its groups,
    `distnorm_layer_<number>{layer}` of the newest monitored step; `distnorm_alerts_total{kind}` counts, and
    `distnorm_last_step_timestamp_seconds` stands still where a run hangs.

    Args:
        port: where it is served.
        host: the address that it listens at.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

        self._registry, self._gauge = CollectorRegistry(), Gauge
        self._gauges: dict[str, Any] = {}
        self._alerts = Counter(
            "distnorm_alerts", "Alerts since the run's start.", ["kind"], registry=self._registry
        )
        self._server, self._thread = start_http_server(port, addr=host, registry=self._registry)

    def step(self, row: Mapping[str, Any]) -> None:
        for key, group, value in scalars(row):
            if group is None:
                self._named(key).set(value)
            else:
                self._named(f"group_{key}", "group").labels(group).set(value)
        self._named("step").set(row["step"])
        self._named("last_step_timestamp_seconds").set_to_current_time()

    def layers(self, step: int, rows: Sequence[LayerRow]) -> None:
        for row in rows:
            for key, value in row.numbers().items():
                self._named(f"layer_{key}", "layer").labels(row.layer).set(value)

    def alert(self, alert: Alert) -> None:
        self._alerts.labels(alert.kind).inc()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _named(self, key: str, *labels: str) -> Any:
        if key not in self._gauges:
            name = "distnorm_" + re.sub(r"\W", "_", key)
            text = f"{key.replace('_', ' ')} at the newest step that has it"
            self._gauges[key] = self._gauge(name, text, labels, registry=self._registry)
        return self._gauges[key]
