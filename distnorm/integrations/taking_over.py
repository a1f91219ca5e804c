"""One clipper at a time: a trainer's own limit becomes distnorm's, or is refused by its key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distnorm.config import Config, load_config
from distnorm.errors import ConfigError

ConfigSource = str | Path | Mapping[str, Any] | Config | None
"""What `GradClipper` takes as its configuration."""


def taken_over(config: ConfigSource, limit: float | None, key: str) -> Config:
    """The configuration with a trainer's limit as `clip.max_norm`, where it has none of its own.

    Args:
        config: as for `GradClipper`.
        limit: what the trainer would clip to; `None`, 0 and inf clip nothing, and change nothing here.
        key: the trainer's name for it.

    Raises:
        ConfigError: both are set, and differ; or the policy has no max norm. The key is named.
    """
    own = load_config(config)
    if not limit or limit == float("inf"):
        return own
    clip = own.clip
    if clip.policy.name in ("agc", "adagc", "aggc"):
        raise ConfigError(
            f"{key}: expected 0, or none, under clip.policy {clip.policy.name}, which has no max norm; "
            f"found {limit}"
        )
    if clip.max_norm is None:
        return load_config(own, [f"clip.max_norm={limit!r}"])
    if clip.max_norm != limit:
        raise ConfigError(
            f"{key}: expected 0, or {clip.max_norm} as clip.max_norm says, found {limit}: only one of two "
            "limits can be in force"
        )
    return own
