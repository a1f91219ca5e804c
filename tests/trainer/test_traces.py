"""Every shipped topology trains the same model: its losses and norms are the single process's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distnorm import load_config
from distnorm.trainer import verify
from tests.old_torch import PIPELINES

from .tiny import CONFIGS, rank_count, rows, shipped, trace, train, written_config

SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
# DeepSpeed's are in tests/engines: they need it installed, and have no float64.
NAMES = [
    name for name in SHIPPED if load_config(CONFIGS / f"{name}.yaml").train.parallel.backend != "deepspeed"
]

# What float64 leaves of the order of sums, after a few steps of an optimizer that divides by small numbers.
RTOL = 1e-9

# Configs that show something else than a topology, and where.
OTHER_SECTIONS = {"zclip": "clip", "monitor": "monitor"}

FOUR_LAYERS = "train.model.layers=4"
UNTIED = "train.model.tie_embeddings=false"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """The single process's trace with given overrides, trained once."""
    known: dict[tuple[str, ...], list[Any]] = {}

    def of(*overrides: str) -> list[Any]:
        if overrides not in known:
            folder = tmp_path_factory.mktemp("single")
            train(shipped("single", folder, *overrides))
            known[overrides] = trace(folder)
        return known[overrides]

    return of


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_shipped_topology_trains_as_one_process(
    name: str, ranks: Callable[..., list[Any]], single: Callable[..., list[Any]], tmp_path: Path
) -> None:
    # The pipeline of four stages is the only one that needs four layers.
    layers = (FOUR_LAYERS,) if "pp4" in name else ()
    config = shipped(name, tmp_path, *layers)
    results = ranks(rank_count(config), train, config, timeout=240)
    assert [code for code, _ in results] == [0] * len(results)
    assert all(printed == "" for _, printed in results[1:])
    lines = results[0][1].splitlines()
    assert lines[-1] == str(tmp_path / "metrics.jsonl")
    assert sum(line.startswith("step ") for line in lines) == 3
    for found, expected in zip(trace(tmp_path), single(*layers), strict=True):
        assert found == pytest.approx(expected, rel=RTOL, abs=0)
    losses = [row["loss"] for row in rows(tmp_path)]
    assert losses == sorted(losses, reverse=True)
    assert all(row["clipped"] for row in rows(tmp_path)), "a threshold that never binds would test nothing"
    assert load_config(written_config(tmp_path)) == config


@pytest.mark.parametrize("name", ["pp2_tied", "tp2", "tp2_sp", "pp2_tp2_sp", "fsdp2_tp2"])
@pytest.mark.slow
def test_untied_embeddings_train_as_one_process(
    name: str, ranks: Callable[..., list[Any]], single: Callable[..., list[Any]], tmp_path: Path
) -> None:
    config = shipped(name, tmp_path, UNTIED)
    ranks(rank_count(config), train, config)
    for found, expected in zip(trace(tmp_path), single(UNTIED), strict=True):
        assert found == pytest.approx(expected, rel=RTOL, abs=0)


@pytest.mark.parametrize("override", ["train.optimizer.name=sgd", "train.optimizer.fused=false"])
@pytest.mark.slow
def test_optimizers_on_two_meshes_train_as_one_process(
    override: str, ranks: Callable[..., list[Any]], single: Callable[..., list[Any]], tmp_path: Path
) -> None:
    config = shipped("fsdp2_tp2", tmp_path, override)
    ranks(4, train, config)
    for found, expected in zip(trace(tmp_path), single(override), strict=True):
        assert found == pytest.approx(expected, rel=RTOL, abs=0)


@PIPELINES
def test_more_microbatches_change_nothing(
    ranks: Callable[..., list[Any]], single: Callable[..., list[Any]], tmp_path: Path
) -> None:
    config = shipped("pp2_tied", tmp_path, "train.parallel.microbatches=8")
    ranks(2, train, config)
    for found, expected in zip(trace(tmp_path), single(), strict=True):
        assert found == pytest.approx(expected, rel=RTOL, abs=0)


@pytest.mark.slow
def test_bfloat16_trains(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    config = shipped("fsdp2_tp2", tmp_path, "train.dtype=bfloat16")
    ranks(4, train, config)
    losses = [row["loss"] for row in rows(tmp_path)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_says_how_to_start_it(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    lines = path.read_text().splitlines()
    count = rank_count(load_config(path))
    command = f"torchrun --nproc-per-node {count}" if count > 1 else "python"
    assert lines[0] == "# yaml-language-server: $schema=schema.json"
    assert lines[2] == (
        f"# {count} rank{'s' if count > 1 else ''}: {command} -m distnorm train configs/{name}.yaml"
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_differ_in_the_topology_alone(name: str) -> None:
    def facts(of: str) -> dict[str, Any]:
        everything = load_config(CONFIGS / f"{of}.yaml").model_dump()
        del everything["train"]["parallel"], everything["train"]["deepspeed"]
        if name in OTHER_SECTIONS:
            del everything[OTHER_SECTIONS[name]]
        assert everything["train"].pop("output_dir") == f"runs/{of}"
        return everything

    assert facts(name) == facts("single")


@pytest.mark.parametrize("name", ["single", "fsdp2_tp2", "pp2_tied", "fsdp1_hybrid2x2"])
@pytest.mark.slow
def test_verify_passes_and_writes_nothing(name: str, ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    config = shipped(name, tmp_path / "run")
    assert ranks(rank_count(config), verify.main, config) == [0] * rank_count(config)
    assert not (tmp_path / "run").exists()
