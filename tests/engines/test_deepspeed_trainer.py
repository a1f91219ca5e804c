"""The trainer on DeepSpeed's engines: every shipped config trains as one process."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distnorm import Config, RunError
from distnorm.trainer import verify
from distnorm.trainer.data import Text
from distnorm.trainer.deepspeed_settings import engine_settings
from distnorm.trainer.topology import Topology
from tests.trainer.tiny import CONFIGS, rank_count, rows, shipped, trace, train

NAMES = sorted(p.stem for p in CONFIGS.glob("*.yaml") if "backend: deepspeed" in p.read_text())
FLOAT32 = "train.dtype=float32"
OFFLOAD = "train.deepspeed.offload=true"
STEPS = "train.steps=10"

# float32's rounding, after ten steps of an optimizer that divides by small numbers.
RTOL = 1e-4


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("single")
    train(shipped("single", folder, FLOAT32, STEPS))
    return trace(folder)


@pytest.mark.parametrize(
    ("name", "overrides"), [*((name, ()) for name in NAMES), ("zero1", (OFFLOAD,)), ("zero2", (OFFLOAD,))]
)
def test_shipped_config_trains_as_one_process(
    name: str,
    overrides: tuple[str, ...],
    engine_ranks: Callable[..., list[Any]],
    single: list[Any],
    tmp_path: Path,
) -> None:
    config = shipped(name, tmp_path, FLOAT32, STEPS, "monitor.every=5", *overrides)
    results = engine_ranks(rank_count(config), train, config, timeout=300)
    assert [code for code, _ in results] == [0] * len(results)
    assert all(printed == "" for _, printed in results[1:])
    for found, expected in zip(trace(tmp_path), single, strict=True):
        assert found == pytest.approx(expected, rel=RTOL, abs=0)
    assert all(row["clipped"] for row in rows(tmp_path)), "a threshold that never binds would test nothing"
    layers = [json.loads(line) for line in (tmp_path / "layers.jsonl").read_text().splitlines()]
    for step in (5, 10):
        norms = [row["norm"] for row in layers if row["step"] == step]
        assert min(norms) > 0 and len(norms) > 20
        assert math.hypot(*norms) == pytest.approx(rows(tmp_path)[step - 1]["grad_norm"], rel=1e-6)
    assert (tmp_path / "alerts.jsonl").read_bytes() == b""


def test_there_is_a_config_of_every_stage_and_a_pipeline() -> None:
    assert {"zero0", "zero1", "zero2", "zero3", "zero3_offload", "zero0_pp2", "zero1_pp2"} == set(NAMES)


def test_untied_embeddings_in_a_pipeline_train_as_one_process(
    engine_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    untied = (FLOAT32, "train.model.tie_embeddings=false")
    train(shipped("single", tmp_path / "single", *untied))
    engine_ranks(4, train, shipped("zero1_pp2", tmp_path / "pipeline", *untied), timeout=300)
    for found, expected in zip(trace(tmp_path / "pipeline"), trace(tmp_path / "single"), strict=True):
        assert found == pytest.approx(expected, rel=RTOL, abs=0)


def train_and_say_timeouts(config: Config) -> list[float]:
    """The seconds that each group waits, those that the engine has made among them."""
    train(config)
    backends = [group._get_backend(torch.device("cpu")) for group in dist.distributed_c10d._world.pg_map]
    return [backend.options._timeout.total_seconds() for backend in backends]


def test_bfloat16_trains_with_one_timeout_for_all_groups(
    engine_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    config = shipped("zero2", tmp_path, "train.dtype=bfloat16", "train.timeout=250")
    for timeouts in engine_ranks(2, train_and_say_timeouts, config, timeout=300):
        assert len(timeouts) > 1 and set(timeouts) == {250.0}
    losses = [row["loss"] for row in rows(tmp_path)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["zero2", "zero1_pp2"])
def test_verify_passes(name: str, engine_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    config = shipped(name, tmp_path / "run", FLOAT32)
    assert engine_ranks(rank_count(config), verify.main, config, timeout=300) == [0] * rank_count(config)
    assert not (tmp_path / "run").exists()


def verify_another_batch(config: Config) -> int:
    """Verify with an engine that is given other rows than the judge."""
    batch = Text.batch
    Text.batch = lambda self, step, part=0, parts=1: batch(self, step + (parts > 1), part, parts)
    return verify.main(config)


def test_verify_finds_a_wrong_gradient(engine_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    assert engine_ranks(2, verify_another_batch, shipped("zero2", tmp_path / "run", FLOAT32)) == [1, 1]


def test_nonfinite_ends_the_run(engine_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    config = shipped("zero2", tmp_path, FLOAT32, "train.optimizer.lr=1e30", "train.steps=5")
    failures = engine_ranks(2, train, config, expect_errors=True, timeout=300)
    assert ["NonFiniteGradientError" in str(failure) for failure in failures] == [True, True]
    assert all(math.isfinite(row["grad_norm"]) for row in rows(tmp_path))


def settings_of(tmp_path: Path, content: dict[str, Any], *overrides: str) -> dict[str, Any]:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(content))
    config = shipped("zero2", tmp_path, FLOAT32, f"train.deepspeed.config={file}", *overrides)
    return engine_settings(config, Topology(config, None))


def test_the_file_adds_to_what_the_yaml_says(tmp_path: Path) -> None:
    settings = settings_of(
        tmp_path,
        {"zero_optimization": {"stage": 2, "overlap_comm": True}, "wall_clock_breakdown": False},
        OFFLOAD,
    )
    zero = settings["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["offload_optimizer"]) == (2, True, {"device": "cpu"})
    assert settings["wall_clock_breakdown"] is False
    assert settings["gradient_clipping"] == 0.0
    assert settings["train_batch_size"] == 16


def test_what_the_file_says_otherwise_is_an_error_that_names_each_key(tmp_path: Path) -> None:
    content = {
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
        "optimizer": {"type": "Adam"},
    }
    with pytest.raises(RunError) as caught:
        settings_of(tmp_path, content)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert (
        "gradient_clipping: expected 0.0, which clip.max_norm, by which distnorm clips, says, found 1.0"
        in lines[0]
    )
    assert "zero_optimization.stage: expected 2, which train.deepspeed says, found 3" in lines[1]
    assert "bf16.enabled: expected false, which train.dtype says, found true" in lines[2]
    assert "optimizer: expected null, which train.optimizer says" in lines[3]


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_file_that_is_no_json_object_is_refused_by_name(text: str, tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(text)
    config = shipped("zero2", tmp_path, FLOAT32, f"train.deepspeed.config={file}")
    with pytest.raises(RunError, match=r"train\.deepspeed\.config: expected .*deepspeed\.json"):
        engine_settings(config, Topology(config, None))


def test_without_a_process_group_it_says_what_is_needed(tmp_path: Path) -> None:
    config = shipped("single", tmp_path, FLOAT32, "train.parallel.backend=deepspeed")
    with pytest.raises(RunError, match="needs a process group, even of one rank; start it with torchrun"):
        train(config)


def test_launch_script_trains(tmp_path: Path) -> None:
    script = CONFIGS.parent / "launch" / "deepspeed.sh"
    sizes = "train.model={dim: 32, layers: 2, heads: 4, context: 16, tie_embeddings: true}"
    command = [script, "train", CONFIGS / "zero1.yaml", "--set", sizes]
    command += ["--set", "train.steps=2", "--set", f"train.output_dir={tmp_path / 'run'}"]
    environment = os.environ | {"PYTHON": sys.executable, "NPROC_PER_NODE": "2", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(rows(tmp_path / "run")) == 2
