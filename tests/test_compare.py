"""`compare`: tables, tolerances and the first step at which norms part."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distnorm import RunError
from distnorm.monitor.compare import main, relative_difference


def write(path: Path, norms: dict[int, Any], loss: float = 2.5) -> Path:
    path.mkdir()
    lines = [json.dumps({"step": step, "loss": loss, "grad_norm": norm}) for step, norm in norms.items()]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


def test_equal_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", {1: 3.0, 2: 5.0})
    b = write(tmp_path / "b", {1: 3.0, 2: 5.0 * (1 + 1e-12)})
    assert main(a, b, 1e-9) == 0
    printed = capsys.readouterr().out
    assert "agree within 1e-09 in 2 steps; the largest difference is 1.0e-12, at step 2" in printed


def test_first_step_at_which_norms_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a", {1: 3.0, 2: 4.0, 3: 5.0})
    b = write(tmp_path / "b", {1: 3.0, 2: 5.0, 3: 9.0})
    assert main(a, b / "metrics.jsonl", 1e-9) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert (
        last
        == "the norms part at step 2: 4.0 and 5.0, a relative difference of 2.0e-01 (at most 1e-09 allowed)"
    )


def test_without_a_tolerance_it_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", {1: 3.0}), write(tmp_path / "b", {1: 4.0, 2: 1.0})
    assert main(a, b) == 0
    header, row, only = capsys.readouterr().out.splitlines()
    assert header.split() == [
        "step",
        "norm",
        "a",
        "norm",
        "b",
        "rel.",
        "diff.",
        "loss",
        "a",
        "loss",
        "b",
        "rel.",
        "diff.",
    ]
    assert row.split() == ["1", "3", "4", "2.5e-01", "2.5", "2.5", "0.0e+00"]
    assert only == f"only in {b}: 1 step, 2"


def test_other_numbers_of_steps_fail_under_a_tolerance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write(tmp_path / "a", {1: 3.0, 2: 1.0, 3: 1.0}), write(tmp_path / "b", {1: 3.0})
    assert main(a, b, 1e-9) == 1
    assert f"only in {a}: 2 steps, 2 to 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("a", "b", "code"), [("nan", None, 0), ("inf", "inf", 0), ("nan", 1.0, 1), ("inf", "-inf", 1)]
)
def test_norms_that_are_not_finite(a: Any, b: Any, code: int, tmp_path: Path) -> None:
    assert main(write(tmp_path / "a", {1: a}), write(tmp_path / "b", {1: b}), 1.0) == code


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (0.0, 0.0, 0.0),
        (0.0, 1.0, 1.0),
        (1e308, -1e308, 2.0),
        (math.nan, math.nan, 0.0),
        (math.nan, 0.0, math.inf),
        (math.inf, math.inf, 0.0),
        (math.inf, 1.0, math.inf),
    ],
)
def test_relative_difference(a: float, b: float, expected: float) -> None:
    assert relative_difference(a, b) == relative_difference(b, a) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "found none"),
        ("not json\n", "line 1: expected JSON"),
        ('{"step": 1}\n', "line 1: expected JSON"),
        (
            '{"step": 1, "loss": 1, "grad_norm": 1}\n' * 2,
            "line 2: expected each step once, found step 1 again",
        ),
    ],
)
def test_unreadable_metrics(content: str, expected: str, tmp_path: Path) -> None:
    good = write(tmp_path / "good", {1: 1.0})
    bad = write(tmp_path / "bad", {})
    (bad / "metrics.jsonl").write_text(content)
    with pytest.raises(RunError, match=expected):
        main(good, bad)


def test_missing_run_and_no_common_step(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {1: 1.0, 2: 1.0}), write(tmp_path / "b", {3: 1.0})
    with pytest.raises(RunError, match=r"found steps 1 to 2 in .* and 3 in"):
        main(a, b)
    with pytest.raises(RunError, match="No such file"):
        main(a, tmp_path / "nowhere")


def test_it_needs_no_torch(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {1: 1.0})
    code = (
        "import sys; from distnorm.monitor.compare import main; "
        f"assert main({str(a)!r}, {str(a)!r}, 0.0) == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
