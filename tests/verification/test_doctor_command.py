"""`distnorm doctor` and `distnorm dump` as they are typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distnorm import cli
from distnorm.monitor.report.doctor_page import read_doctor
from tests.old_torch import VERSION
from tests.trainer.tiny import CONFIGS, TINY

SET = [argument for override in TINY for argument in ("--set", override)]


def config(name: str) -> str:
    return str(CONFIGS / f"{name}.yaml")


@pytest.mark.slow
def test_two_ranks_against_one_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "--nproc-per-node", "2", "-m", "distnorm"]
    command += ["doctor", config("tp2_sp"), "--against", config("single"), "--trace", *SET]
    command += ["--json", str(tmp_path / "doctor.json"), "--page", str(tmp_path / "doctor.html")]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIGS.parent)}
    result = subprocess.run(
        command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "doctor: every gradient is right (2 ranks" in result.stdout
    facts = json.loads((tmp_path / "doctor.json").read_text())
    assert facts["ok"] is True and facts["ranks"] == 2 and len(facts["parameters"]) > 10
    assert "every gradient is right" in (tmp_path / "doctor.html").read_text()


@pytest.mark.skipif(VERSION < (2, 7), reason="torch 2.6: no checkpoint without a process group, so no dump")
def test_a_dump_is_compared_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump = str(tmp_path / "dump")
    assert cli.main(["dump", config("single"), "-o", dump, *SET]) == 0
    assert cli.main(["doctor", config("single"), "--against", dump, *SET]) == 0
    assert "every gradient is right" in capsys.readouterr().out
    other = [*SET, "--set", "train.seed=1"]
    assert cli.main(["doctor", config("single"), "--against", dump, *other]) == 1
    assert "the weight is not the reference's" in capsys.readouterr().out


def test_verify_goes_on_to_the_gradients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, against = tmp_path / "doctor.json", ["--against", config("single")]
    assert cli.main(["verify", config("single"), *against, "--json", str(file), *SET]) == 0
    printed = capsys.readouterr().out
    assert printed.index("gradient norm verified") < printed.index("doctor: every gradient is right")
    facts = json.loads(file.read_text())
    page, ok = read_doctor(tmp_path), facts["ok"]
    assert (
        ok
        and page[0] is not None
        and page[0].headline.startswith(f"All {len(facts['parameters'])} gradients")
    )
    assert {layer.state for layer in page[0].layers} == {"right"}
    assert cli.main(["verify", config("single"), "--trace", *SET]) == 2
    assert "expected --against with --trace, --json or --page" in capsys.readouterr().err
