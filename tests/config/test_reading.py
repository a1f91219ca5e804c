"""What is read."""

from __future__ import annotations

import math
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from distnorm.config import ClipConfig, Config, load_config
from tests.config.files import load


def test_defaults_are_the_documented_ones() -> None:
    config = load_config()
    assert config == Config() == load_config({})
    assert (config.norm.type, config.clip.max_norm, config.clip.nonfinite) == (2.0, None, "raise")
    assert config.train.model_dump() == {
        "seed": 0,
        "steps": 20,
        "device": "auto",
        "dtype": "float32",
        "output_dir": "runs/run",
        "model": {"dim": 128, "layers": 4, "heads": 4, "context": 128, "tie_embeddings": True},
        "data": {"path": None, "batch_size": 16},
        "optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.0, "fused": True},
        "parallel": {
            "backend": "fsdp2",
            "dp_replicate": 1,
            "dp_shard": 1,
            "tp": 1,
            "pp": 1,
            "sequence_parallel": False,
            "microbatches": None,
        },
        "deepspeed": {"zero_stage": 2, "offload": False, "pipeline": False, "config": None},
        "checkpoint": {"every": None, "resume_from": None},
        "timeout": None,
    }


def test_the_example_of_the_design_loads(file: Path) -> None:
    text = """\
norm:
  type: 2.0            # any p > 0, or inf
clip:
  max_norm: 1.0        # null: measure only
  nonfinite: raise     # raise | skip | zero | propagate
monitor: {}
train:
  seed: 0
  steps: 20
  device: auto
  output_dir: runs/quickstart
  model: {dim: 128, layers: 4, heads: 4, context: 128, tie_embeddings: true}
  data: {path: null, batch_size: 16}
  optimizer: {name: adamw, lr: 3.0e-3, fused: true}
  parallel: {backend: fsdp2, dp_replicate: 1, dp_shard: 2, tp: 2, pp: 1}
"""
    config = load(file, text)
    assert config.clip.max_norm == 1.0
    assert (config.train.parallel.dp_shard, config.train.parallel.tp) == (2, 2)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E+3", 1e3),
        ("1", 1.0),
        ("+1.5", 1.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("010", 10.0),
        ("0x10", 16.0),
        ("0o10", 8.0),
        ("0", 0.0),
        ("inf", math.inf),
        ('"inf"', math.inf),
        (".inf", math.inf),
        ("+.INF", math.inf),
        ("null", None),
        ("~", None),
        ("!!float 1", 1.0),
        ("&anchor 1", 1.0),
    ],
)
def test_numbers_are_those_of_yaml_1_2(file: Path, text: str, value: float | None) -> None:
    found = load(file, f"clip: {{max_norm: {text}}}").clip.max_norm
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["on", "off", "yes", "no", "y", "12:30", "1_000", "2026-11-23", "0b1", "1e", "<<"]
)
def test_strings_that_yaml_1_1_takes_for_something_else(file: Path, text: str) -> None:
    assert load(file, f"train: {{output_dir: {text}}}").train.output_dir == text


def test_an_integer_is_a_fine_float_and_becomes_one(file: Path) -> None:
    config = load(file, "norm: {type: 3}\ntrain: {optimizer: {lr: 1}}\n")
    assert isinstance(config.norm.type, float)
    assert isinstance(config.train.optimizer.lr, float)


def test_a_leading_zero_is_decimal(file: Path) -> None:
    assert load(file, "train: {steps: 010}").train.steps == 10


@pytest.mark.parametrize(
    "text", ["{}", "--- {}\n...\n", "\ufeffclip: {}\n", "%YAML 1.2\n---\nclip: {}\n", "clip: {}\r\n"]
)
def test_unusual_but_right_documents(file: Path, text: str) -> None:
    assert load(file, text) == Config()


def test_a_mapping_may_be_any_mapping_and_hold_paths_and_sections() -> None:
    given_ = MappingProxyType(
        {"clip": ClipConfig(max_norm=2), "train": MappingProxyType({"output_dir": Path("runs/x")})}
    )
    config = load_config(given_)
    assert config.clip.max_norm == 2.0
    assert config.train.output_dir == "runs/x"
    assert load_config(dict(given_), ["clip.nonfinite=zero"]).clip == ClipConfig(max_norm=2, nonfinite="zero")


def test_what_a_layer_is_may_be_a_list_of_patterns(file: Path) -> None:
    config = load(file, 'monitor: {every: 10, by: ["*.attn.*", "head"]}')
    assert config.monitor.by == ("*.attn.*", "head")
    assert load(file, config.to_yaml()) == config
    assert {config: 1}[load_config({"monitor": {"every": 10, "by": ["*.attn.*", "head"]}})] == 1
    assert load_config(None, ["monitor.by=depth"]).monitor.by == "depth"


def test_a_mapping_is_left_as_it_is() -> None:
    source: dict[str, Any] = {"clip": {"max_norm": 1.0}, "train": {"parallel": {}}}
    load_config(source, ["clip.max_norm=2", "train.parallel.tp=2"])
    assert source == {"clip": {"max_norm": 1.0}, "train": {"parallel": {}}}


def test_a_config_is_returned_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTNORM_CLIP__MAX_NORM", "7")
    config = Config()
    assert load_config(config) is config
    changed = load_config(config, ["clip.max_norm=3"])
    assert (config.clip.max_norm, changed.clip.max_norm) == (None, 3.0)


def test_a_config_is_frozen_and_hashable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().clip.max_norm = 1.0  # type: ignore[misc]
    assert {Config(): 1}[load_config()] == 1
