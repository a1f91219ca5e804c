"""benchmarks/gpu.py without a GPU: it checks itself in Triton's interpreter, and reports no figure."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton here")


def run(*arguments: str) -> tuple[int, str]:
    before = set((ROOT / "benchmarks").iterdir())
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}", "OMP_NUM_THREADS": "1"},
    )
    left = set((ROOT / "benchmarks").iterdir()) - before
    assert {path.name for path in left} <= {"__pycache__"}, "no report is written"
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_dry_run_checks_every_part_and_measures_nothing():
    code, told = run("benchmarks/gpu.py", "--dry")
    assert code == 0, told
    assert told.startswith("no GPU: nothing is measured") and "failed: nothing\n" in told
    for part in ("bandwidth", "published", "sizes", "many", "overlap", "graph", "tests", "sanitizer"):
        assert f"\n## {part}\n" in told
    assert told.count("distnorm: correct") == 2 and "statistics of each tensor: launches: 2" in told
    assert "a step of GradClipper: launches: 3" in told, "two for the norm, and one that scales"
    assert not re.search(r"\d ?(ms|GB/s)\b(?! by)", told), "no figure"


@pytest.mark.slow
def test_one_part_that_fails_does_not_cost_the_others():
    code = """import gpu, sys
def bandwidth(session): "It fails."; raise AssertionError("planted")
gpu.PARTS["bandwidth"] = bandwidth
sys.argv = ["gpu.py", "--dry", "--only", "bandwidth", "graph"]
sys.exit(gpu.main())"""
    status, told = run("-c", f"import sys; sys.argv.append('--dry')\n{code}")
    assert status == 1 and "FAILED: AssertionError: planted" in told
    assert "steps are equal, bit for bit" in told and "failed: bandwidth\n" in told


@pytest.mark.slow
def test_a_wrong_kernel_is_found():
    code = """import sys; sys.argv.append("--dry")
import gpu
from distnorm.kernels import gpu_statistics
right = gpu_statistics.summaries
gpu_statistics.summaries = lambda *given: right(*given) * 1.001
sys.argv = ["gpu.py", "--dry", "--only", "many"]
sys.exit(gpu.main())"""
    status, told = run("-c", code)
    assert status == 1 and "FAILED: AssertionError: expected a norm of" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.slow
def test_without_a_gpu_it_refuses_to_report():
    status, told = run("benchmarks/gpu.py")
    assert status == 2 and "no report is written" in told
