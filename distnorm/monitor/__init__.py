"""Watching a run: what its files say, and what becomes of them."""

from distnorm.monitor.monitor import Monitor
from distnorm.monitor.records import Alert, LayerRow

__all__ = ["Alert", "LayerRow", "Monitor"]
