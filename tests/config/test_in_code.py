"""Configurations given in code."""

from __future__ import annotations

import math
from typing import Any

import pytest

from distnorm.config import ClipConfig, Config, TrainConfig, load_config
from distnorm.errors import ConfigError


def test_a_mapping_names_the_key() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"clip": {"max_nrom": 1}, "norm": {"type": "x"}, 3: 4, "monitor": None})  # type: ignore[dict-item]
    assert {str(problem) for problem in caught.value.problems} == {
        "<config>: clip.max_nrom: unknown key; did you mean 'max_norm'?",
        "<config>: norm.type: expected a number > 0 or inf, found the string 'x'",
        "<config>: 3: expected a string as key, found 3 of type int",
        "<config>: monitor: expected a mapping with the keys every, by, clip_rate_window, "
        "stop_after, replicas, cosines, updates, slices, "
        "spectral, spectral_vectors, fingerprints, dir, alerts, sinks, console, "
        "found null",
    }


def test_a_mapping_that_holds_itself_is_refused() -> None:
    endless: dict[str, Any] = {}
    endless["clip"] = endless
    with pytest.raises(ConfigError, match="levels"):
        load_config(endless)


def test_values_of_other_types_are_shown_with_their_type() -> None:
    with pytest.raises(ConfigError, match=r"found 1j of type complex"):
        load_config({"clip": {"max_norm": 1j}})


def test_models_made_directly_raise_the_same_error() -> None:
    with pytest.raises(
        ConfigError, match=r"^<config>: clip.max_norm: expected a number >= 0, inf or null, found nan$"
    ):
        Config(clip={"max_norm": math.nan})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^<config>: max_norm: .* found -1$"):
        ClipConfig(max_norm=-1)
    with pytest.raises(ConfigError, match=r"^<config>: parallel.tp: expected model.heads to be a multiple"):
        TrainConfig(parallel={"tp": 3})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected a mapping with the keys"):
        Config(clip=TrainConfig())  # type: ignore[arg-type]
