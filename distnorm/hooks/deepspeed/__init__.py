"""DeepSpeed engines: the norm is taken, and the gradient scaled, inside the engine's own step."""

from __future__ import annotations

from distnorm.hooks.deepspeed.hook import DeepSpeedHook, is_engine
from distnorm.hooks.deepspeed.verdict import EngineClipper

__all__ = ["DeepSpeedHook", "EngineClipper", "is_engine"]
