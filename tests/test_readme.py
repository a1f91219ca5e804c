"""README's Python is run as it stands, and the tests that it names exist."""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib.util
import io
import math
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.old_torch import PIPELINES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPT = re.compile(
    r"^### ([^\n]+)\n\n```sh\ntorchrun ([^\n]+)\n```\n\n```python\n(.*?)```", re.MULTILINE | re.DOTALL
)
SCRIPTS = {title: (shlex.split(arguments), code) for title, arguments, code in SCRIPT.findall(README)}
TITLES = ("FSDP2", "FSDP1", "FSDP2 x tensor parallel", "DeepSpeed")
# gloo's threads need the interpreter's lock to let go of tensors; when a script is over they abort, and under
# FSDP1 so they do without distnorm.
LETS_GO = """import atexit, os, time
if "RANK" in os.environ:
    atexit.register(time.sleep, 0.2)
"""
# DeepSpeed would first compile its shared-memory collectives for the CPU, and has no switch for it.
WITHOUT_COMPILER = """
import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
"""


@pytest.mark.slow
def test_examples_run_one_after_the_other() -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", SCRIPT.sub("", README), flags=re.DOTALL))
    assert "GradClipper" in code
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "'was_clipped'" in result.stdout


def test_scripts_are_short() -> None:
    for _, code in SCRIPTS.values():
        assert len([line for line in code.splitlines() if line]) <= 18


@pytest.mark.slow
def test_a_script_runs_under_torchrun(tmp_path: Path) -> None:
    (*options, file), code = SCRIPTS["torch"]
    (tmp_path / file).write_text(code)
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    (tmp_path / "sitecustomize.py").write_text(LETS_GO)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d"]
    torchrun += ["--rdzv-endpoint=localhost:0", "--redirects=1", f"--log-dir={tmp_path}"]
    result = subprocess.run(
        [*torchrun, *options, file], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert_ranks_agree(options, [path.read_text() for path in tmp_path.rglob("stdout.log")])


def as_torchrun_would(code: str, port: int) -> str:
    """What the script prints on this rank, in a group that it makes itself."""
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    printed = io.StringIO()
    if "import deepspeed" in code:
        exec(WITHOUT_COMPILER)
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "script.py", "exec"), {"__name__": "__main__"})
    gc.collect()  # FSDP1's wrappers refer to themselves, and hold groups whose threads hold tensors
    return printed.getvalue()


@pytest.mark.parametrize("title", [*TITLES, pytest.param("Pipeline", marks=PIPELINES)])
def test_a_script_runs_on_ranks(ranks: Callable[..., list[str]], title: str) -> None:
    """In processes that have imported torch already, which is what a script takes most of its time for."""
    if title == "DeepSpeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: pip install distnorm[deepspeed]")
    (*options, _), code = SCRIPTS[title]
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    found = assert_ranks_agree(options, ranks(ranks_of(options), as_torchrun_would, code, port))
    if title == "Pipeline":
        assert found["total_norm"] == pytest.approx(norm_of_the_pipeline_in_one_process(), rel=1e-6)


def ranks_of(options: list[str]) -> int:
    return int(options[options.index("--nproc-per-node") + 1])


def assert_ranks_agree(options: list[str], outputs: list[str]) -> dict[str, Any]:
    """On a norm that can be; returns what the first rank printed."""
    results = [ast.literal_eval(re.findall(r"^{.*}$", output, re.MULTILINE)[-1]) for output in outputs]
    assert len(results) == ranks_of(options)
    assert all(result == results[0] for result in results)
    assert math.isfinite(results[0]["total_norm"]) and results[0]["total_norm"] > 0
    return dict(results[0])


def norm_of_the_pipeline_in_one_process() -> float:
    weight = torch.empty(16, 8, dtype=torch.float64)
    weight = weight.copy_(
        torch.empty(16, 8).normal_(generator=torch.Generator().manual_seed(0))
    ).requires_grad_()
    logits = weight[:4] @ weight.T
    torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    assert weight.grad is not None
    return float(weight.grad.norm())


def test_named_files_and_topologies_exist() -> None:
    files = set(re.findall(r"`((?:tests|configs|docs|launch|benchmarks)/[\w./-]+)", README))
    assert len(files) > 5
    assert not [name for name in files if not (ROOT / name).exists()]
    supported = (ROOT / "docs" / "supported.md").read_text(encoding="utf-8")
    topologies = set(re.findall(r"\[(\w+)\]`", supported))
    assert len(topologies) > 10
    assert not [name for name in topologies if not (ROOT / "configs" / f"{name}.yaml").exists()]
