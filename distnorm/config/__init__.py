"""YAML to a validated configuration, with the place of every mistake."""

from distnorm.config.clip_models import ClipConfig, GroupConfig
from distnorm.config.loading import load_config
from distnorm.config.models import Config, NormConfig, TrainConfig, json_schema
from distnorm.config.monitor_models import (
    AlertsConfig,
    MonitorConfig,
    NotifyConfig,
    SinksConfig,
    SliceConfig,
)
from distnorm.config.train_models import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
)

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
    "NotifyConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "SinksConfig",
    "SliceConfig",
    "TrainConfig",
    "json_schema",
    "load_config",
]
