"""YAML to a validated configuration, with the place of every mistake."""

from distnorm.config.clip_models import ClipConfig, GroupConfig
from distnorm.config.loading import load_config
from distnorm.config.models import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    MonitorConfig,
    NormConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    json_schema,
)

__all__ = [
    "CheckpointConfig",
    "ClipConfig",
    "Config",
    "DataConfig",
    "GroupConfig",
    "ModelConfig",
    "MonitorConfig",
    "NormConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "TrainConfig",
    "json_schema",
    "load_config",
]
