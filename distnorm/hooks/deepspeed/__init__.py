"""DeepSpeed engines: the norm is taken, and the gradient scaled, inside the engine's own step."""

from __future__ import annotations

from distnorm.hooks.deepspeed.hook import DeepSpeedHook, is_engine

__all__ = ["DeepSpeedHook", "is_engine"]
