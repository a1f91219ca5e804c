"""Every workload, tiny, on ranks; the command's exit code, its table and its JSON."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from distnorm import load_config
from distnorm.bench import WORKLOADS, run, workloads
from distnorm.bench.contenders import Contender
from distnorm.bench.peers import Peers

CONFIGS = Path(__file__).parents[2] / "configs"
ROUNDS = 2
TITLES = {
    "many": ["FSDP2, 30 tensors of 32 x 16, all clipped"],
    "moe": ["FSDP2 on two meshes, 2 layers of 4 experts over ep 2, all clipped"],
    "ddp": [
        "DDP, 0.00288 million parameters, nothing clipped",
        "DDP, 0.00288 million parameters, all clipped",
    ],
    "fsdp": ["FSDP2, 2 layers, 18 tensors, all clipped", "FSDP1, 2 layers, 18 tensors, all clipped"],
    "clip-step": [
        "DDP, 0.00288 million parameters, all clipped, AdamW's step",
        "DDP, 0.00288 million parameters, all clipped, forward, backward and AdamW's step",
    ],
    "fingerprints": [f"2 tensors of 1e+04 elements, {dtype}" for dtype in ("float32", "bfloat16")],
}
LARGE = [f"one tensor of 1e+06 elements, {dtype}, norm only" for dtype in ("float32", "bfloat16", "float16")]


def bench(*names: str, **options: Any) -> tuple[int, str]:
    """Exit code and what was printed."""
    options = {"peers": Peers(), "device": "cpu", "rounds": ROUNDS, "scale": 0.01} | options
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()):
        code = run.main(names, **options)
    return code, printed.getvalue()


@pytest.mark.slow
def test_every_workload_on_two_ranks(ranks: Any, tmp_path: Path) -> None:
    file = tmp_path / "samples.json"
    (code, printed), (other_code, nothing) = ranks(2, timed, (), str(file), None)
    assert (code, other_code, nothing) == (0, 0, "")
    found = json.loads(file.read_text())
    assert [(w["workload"], w["title"]) for w in found["workloads"]] == [
        (name, title) for name, titles in TITLES.items() for title in titles
    ]
    assert all(title in printed for titles in TITLES.values() for title in titles)
    assert "How this can mislead" in printed
    for workload in found["workloads"]:
        by_name = {row["name"]: row for row in workload["contenders"]}
        assert workload["reference"] in by_name
        for name, row in by_name.items():
            assert row["problem"] is None, (workload["title"], name)
            assert len(row["seconds"]) == ROUNDS and min(row["seconds"]) > 0
            assert row["bytes_per_second"] == pytest.approx(workload["bytes"] / row["median"])
            assert row["percent_of_limit"] == pytest.approx(100 * workload["limit_seconds"] / row["median"])
        assert by_name[workload["reference"]]["ratio_to_reference"] == 1.0
        if workload["workload"] not in ("clip-step", "fingerprints"):
            assert {"distnorm.GradClipper", "distnorm.clip_grad_norm_", "Megatron's rule"} < set(by_name)


def timed(names: tuple[str, ...], file: str, config: str | None) -> tuple[int, str]:
    return bench(*names, json_file=file, config=config)


def test_the_json_says_what_it_was_taken_on(tmp_path: Path) -> None:
    file = tmp_path / "samples.json"
    code, printed = bench("many", json_file=str(file))
    found = json.loads(file.read_text())
    assert code == 0 and found["ranks"] == 1
    assert set(found) == {
        "command", "date", "hardware", "versions", "device", "ranks", "threads", "limit", "workloads",
    }  # fmt: skip
    assert found["hardware"]["cores"] == os.cpu_count() and found["hardware"]["cpu"] in printed
    assert {"python", "torch", "distnorm", "deepspeed", "torchtitan"} == set(found["versions"])
    assert set(found["limit"]) == {"read", "write", "latency"}


def test_one_large_tensor_in_one_process() -> None:
    code, printed = bench("large")
    assert code == 0
    assert all(title in printed for title in LARGE)


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("fsdp2_tp2_sp", True),
        ("fsdp1_hybrid2x2", True),
        ("pp2_fsdp2", False),
        ("pp2_fsdp2", True),
    ],
)
@pytest.mark.slow
def test_a_configs_topology(ranks: Any, tmp_path: Path, name: str, tied: bool) -> None:
    """torch's norm counts an embedding that two pipeline stages share twice; that is told apart."""
    file, config = tmp_path / "samples.json", tmp_path / "config.yaml"
    overrides = [f"train.model={{dim: 32, layers: 2, heads: 4, context: 16, tie_embeddings: {tied}}}".lower()]
    config.write_text(load_config(CONFIGS / f"{name}.yaml", overrides).to_yaml())
    found = ranks(4, timed, (), str(file), str(config))
    (workload,) = json.loads(file.read_text())["workloads"]
    assert workload["workload"] == "config"
    wrong = [row["name"] for row in workload["contenders"] if not row["agrees"]]
    assert (wrong, {code for code, _ in found}) == (
        (["torch"], {1}) if tied and name.startswith("pp") else ([], {0})
    )


def with_a_wrong_one() -> tuple[int, str]:
    wrong = Contender("wrong by design", lambda: 0.0)
    usual = workloads.steppers
    with mock.patch.object(workloads, "steppers", lambda *given: [*usual(*given), wrong]):
        return bench("clip-step")


def test_a_wrong_norm_ends_in_1(ranks: Any) -> None:
    (code, printed), (other_code, _) = ranks(2, with_a_wrong_one)
    assert (code, other_code) == (1, 1)
    (line,) = (line for line in printed.splitlines() if "wrong by design" in line)
    assert line.endswith("DISAGREES: off by 1.0e+00, and 1e-04 is allowed")


def test_large_is_refused_on_several_ranks(ranks: Any) -> None:
    failures = ranks(2, bench, "large", expect_errors=True)
    assert [str(f.message) for f in failures] == ["large: expected one process, found 2 ranks"] * 2


def test_all_names_are_known() -> None:
    assert set(WORKLOADS) == set(TITLES) | {"large"}
