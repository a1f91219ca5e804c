"""YAML to a validated configuration, with the place of every mistake."""

from distnorm.config.clip_models import ClipConfig, GroupConfig
from distnorm.config.loading import load_config
from distnorm.config.models import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    NormConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    json_schema,
)
from distnorm.config.monitoring import AlertsConfig, MonitorConfig, SinksConfig

__all__ = [
    "AlertsConfig",
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
    "SinksConfig",
    "TrainConfig",
    "json_schema",
    "load_config",
]
