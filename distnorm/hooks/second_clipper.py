"""Optimizers that clip inside their own step, by the settings they keep."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from distnorm.errors import ConfigError

_KEY = re.compile(r"max_grad_norm|grad_clip\w*|clip_grad\w*|percentile_clipping")
_OFF = {"percentile_clipping": 100}  # the other keys are limits, and 0 or inf is none


def refuse_second_clipper(optimizer: object, path: str = "") -> None:
    """Refuse an optimizer, or a wrapper of one, that clips gradients in its own step.

    Raises:
        ConfigError: a setting in a parameter group, or of the optimizer, says so; `path` and its key name it.
    """
    for settings in _settings(optimizer):
        for key, value in settings.items():
            if _KEY.fullmatch(str(key)) and _is_on(key, value):
                raise ConfigError(
                    f"{path}{key}: expected {_OFF.get(key, 0)}, found {value}: {type(optimizer).__name__} "
                    "would clip a second time, inside its own step"
                )


def _settings(optimizer: object) -> Iterator[Mapping[str, Any]]:
    yield from getattr(optimizer, "param_groups", ())
    yield getattr(optimizer, "__dict__", {})
    yield getattr(getattr(optimizer, "args", None), "__dict__", {})  # where bitsandbytes keeps its own


def _is_on(key: str, value: object) -> bool:
    if not isinstance(value, (int, float)):
        return False
    return value < _OFF[key] if key in _OFF else 0 < value < float("inf")
