"""Monitoring a run: its rows and alerts, where they go, and what is made of them afterwards."""

from distnorm.monitor.monitor import Monitor
from distnorm.monitor.records import Alert, LayerRow

__all__ = ["Alert", "LayerRow", "Monitor"]
