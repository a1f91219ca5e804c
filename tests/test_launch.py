"""The launch scripts, apart from the set-up that they have done by the time these tests run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distnorm import load_config
from distnorm.cli import make_parser

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
        out, err = process.communicate(timeout=180)  # two agents took 100 s on a busy machine
    except subprocess.TimeoutExpired:
        process.terminate()
        out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("script", "some"),
    [
        (
            TORCHRUN,
            {"NNODES", "NPROC_PER_NODE", "RDZV_ENDPOINT", "RDZV_ID", "MAX_RESTARTS", "OMP_NUM_THREADS"},
        ),
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
    assert (code, "NNODES must be a positive number, or two as MIN:MAX; it is 'two'" in err) == (2, True)


def test_deepspeed_script_says_that_deepspeed_is_missing(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    code, _, err = finish(start(DEEPSPEED, "train", "x.yaml", PYTHON=str(bare)))
    assert (code, err.splitlines()[0]) == (1, f"deepspeed.sh: {bare} has no DeepSpeed; install it with:")


@pytest.fixture
def endpoint() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


@pytest.mark.slow
def test_what_can_be_refused_before_is_one_line(tmp_path):
    config = tmp_path / "x.yaml"
    config.write_text("clip: {max_nrom: 1}")
    runs = [start(TORCHRUN, "train", config, NPROC_PER_NODE="2")]
    if not torch.cuda.is_available():
        runs.append(start(TORCHRUN, "train", ROOT / "configs" / "single.yaml"))
    said = ("clip.max_nrom: unknown key; did you mean 'max_norm'?", "no GPU on this machine")
    for run, expected in zip(runs, said, strict=False):
        code, out, err = finish(run)
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert err.startswith("distnorm: error: ") and expected in err


@pytest.mark.slow
def test_a_rank_s_end_is_one_line_more_than_its_own(tmp_path):
    script = tmp_path / "script.py"
    ends = ("raise SystemExit('sorry')", "import os; os.kill(os.getpid(), 9)")
    runs = []
    for end in ends:
        script.write_text(f"import os\nif os.environ['RANK'] == '1': {end}\n")
        runs.append(start(TORCHRUN, script, NPROC_PER_NODE="2"))
        code, _, err = finish(runs[-1])
        *own, last = err.splitlines()
        assert last.startswith(f"distnorm.launch: rank 1 on {socket.gethostname()} ")
        said = {1: (["sorry"], "ended with exit code 1"), 137: ([], "was ended by SIGKILL")}[code]
        assert own == said[0] and said[1] in last


@pytest.mark.slow
def test_what_was_awaited_where_and_how_long(endpoint):
    nodes = {"NNODES": "2", "NPROC_PER_NODE": "1", "RDZV_TIMEOUT": "2"}
    said = {
        endpoint: "for 2 nodes of run 'distnorm', not all came",
        "no.invalid:29400": "could not connect",
    }
    config = ROOT / "configs" / "tp2.yaml"
    runs = {where: start(TORCHRUN, "train", config, RDZV_ENDPOINT=where, **nodes) for where in said}
    for where, run in runs.items():
        code, _, err = finish(run)
        assert (code, len(err.splitlines())) == (1, 1), err
        waited = re.match(r"distnorm.launch: waited (\d+) s", err)
        assert waited and 2 <= int(waited[1]) < 15 and where in err and said[where] in err


@pytest.mark.slow
def test_two_nodes_meet_and_form_one_group(tmp_path, endpoint):
    script = tmp_path / "sum ranks.py"
    script.write_text(SCRIPT)
    nodes = [
        start(
            TORCHRUN, script, "--flag", NNODES="2", NPROC_PER_NODE="1", RDZV_ENDPOINT=endpoint, RDZV_ID="test"
        )
        for _ in range(2)
    ]
    ends = [finish(node) for node in nodes]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert sorted(out for _, out, _ in ends) == [f"rank {rank} of 2 sums 3.0 --flag\n" for rank in (0, 1)]


def test_quickstart_s_next_commands_are_what_the_parser_takes(tmp_path):
    """As printed after a run that a stand-in for Python makes."""
    (tmp_path / "launch").mkdir()
    for name in ("quickstart.sh", "torchrun.sh"):
        shutil.copy(ROOT / "launch" / name, tmp_path / "launch")
    ran, python = tmp_path / "ran", tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {ran}\n')
    python.chmod(0o755)
    (tmp_path / "launch" / "setup.sh").write_text(
        f"ROOT={tmp_path} VENV_PYTHON={python}\nset_up() {{ :; }}\n"
    )
    code, out, err = finish(start(tmp_path / "launch" / "quickstart.sh", "--set", "train.steps=2"))
    assert code == 0, err
    assert ran.read_text().endswith(
        "-m distnorm train configs/quickstart.yaml --overwrite --set train.steps=2\n"
    )
    _, _, commands = out.partition("to try:\n")
    found = []
    for command in commands.replace("\\\n", " ").replace("&&\n", "\n").splitlines():
        words = shlex.split(command, comments=True)
        arguments = words[
            next(i for i, w in enumerate(words) if w.endswith(("distnorm", "torchrun.sh"))) + 1 :
        ]
        make_parser().parse_args(arguments)
        found.append(arguments[0])
        if "--set" in arguments:
            overrides = [arguments[i + 1] for i, word in enumerate(arguments) if word == "--set"]
            assert load_config(ROOT / arguments[1], overrides).train.steps == 2
    assert found == ["report", "verify", "train", "compare"]


def test_every_script_stops_at_the_first_error_and_parses():
    scripts = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]
    for script in scripts:
        assert finish(start("bash", "-n", script))[0] == 0, script
        if script.name != "setup.sh":  # sourced
            assert "set -euo pipefail" in script.read_text(encoding="utf-8"), script
            assert os.access(script, os.X_OK), script
