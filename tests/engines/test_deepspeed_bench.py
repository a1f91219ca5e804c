"""DeepSpeed's functions among the contenders of `distnorm bench`."""

from __future__ import annotations

from typing import Any

from tests.bench.test_workloads import bench


def deepspeed_too() -> tuple[int, str]:
    return bench("ddp", "many", peers=None)


def test_deepspeeds_functions_agree(ranks: Any) -> None:
    (code, printed), _ = ranks(2, deepspeed_too, timeout=240)
    assert code == 0
    assert sum(line.strip().startswith("DeepSpeed ") for line in printed.splitlines()) == 3
