"""The launch scripts, apart from the set-up that they have done by the time these tests run."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TORCHRUN = ROOT / "launch" / "torchrun.sh"
DEEPSPEED = ROOT / "launch" / "deepspeed.sh"
SCRIPT = """
import sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor(float(dist.get_rank() + 1))
dist.all_reduce(total)
print("rank", dist.get_rank(), "of", dist.get_world_size(), "sums", total.item(), *sys.argv[1:], flush=True)
dist.destroy_process_group()
"""


def start(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    names = ("RDZV_ENDPOINT", "MASTER_ADDR", "NNODES", "NPROC_PER_NODE")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.Popen(
        [str(argument) for argument in arguments],
        env={**clean, "PYTHON": sys.executable, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.terminate()
        out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("script", "some"),
    [
        (TORCHRUN, {"NNODES", "NPROC_PER_NODE", "RDZV_ENDPOINT", "RDZV_ID", "OMP_NUM_THREADS"}),
        (DEEPSPEED, {"NPROC_PER_NODE", "HOSTFILE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"}),
    ],
)
def test_help_names_every_variable_that_the_script_reads(script, some):
    code, out, _ = finish(start(script, "--help"))
    assert code == 0
    read = set(re.findall(r"\$\{([A-Z_]+):?-", script.read_text(encoding="utf-8")))
    assert some <= read
    assert {name for name in read if name not in out} == set()


@pytest.mark.parametrize("script", ["quickstart.sh"])
def test_the_other_scripts_explain_themselves(script):
    code, out, _ = finish(start(ROOT / "launch" / script, "--help"))
    assert code == 0
    assert out.startswith(f"usage: ./launch/{script}")


def test_wrong_use_says_what_is_missing():
    code, _, err = finish(start(TORCHRUN))
    assert (code, err.splitlines()[0][:27]) == (2, "usage: ./launch/torchrun.sh")
    code, _, err = finish(start(TORCHRUN, "train", "x.yaml", NNODES="2"))
    assert (code, "2 nodes need RDZV_ENDPOINT" in err) == (2, True)
    code, _, err = finish(start(TORCHRUN, "train", "x.yaml", NNODES="two"))
    assert (code, "NNODES must be a positive number; it is 'two'" in err) == (2, True)


def test_deepspeed_script_says_that_deepspeed_is_missing(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    code, _, err = finish(start(DEEPSPEED, "train", "x.yaml", PYTHON=str(bare)))
    assert (code, err.splitlines()[0]) == (1, f"deepspeed.sh: {bare} has no DeepSpeed; install it with:")


def test_two_nodes_meet_and_form_one_group(tmp_path):
    script = tmp_path / "sum ranks.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    nodes = [
        start(
            TORCHRUN, script, "--flag", NNODES="2", NPROC_PER_NODE="1", RDZV_ENDPOINT=endpoint, RDZV_ID="test"
        )
        for _ in range(2)
    ]
    ends = [finish(node) for node in nodes]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert sorted(out for _, out, _ in ends) == [f"rank {rank} of 2 sums 3.0 --flag\n" for rank in (0, 1)]


def test_every_script_stops_at_the_first_error_and_parses():
    scripts = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]
    for script in scripts:
        assert finish(start("bash", "-n", script))[0] == 0, script
        if script.name != "setup.sh":  # sourced
            assert "set -euo pipefail" in script.read_text(encoding="utf-8"), script
            assert os.access(script, os.X_OK), script
