"""The scripts of docs/integrations.md for transformers and Accelerate are run as they stand."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
SCRIPTS = [
    pytest.param(code, id=f"{title}-{number}")
    for title in ("transformers", "Accelerate")
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", SECTIONS[title], re.DOTALL))
]


@pytest.mark.parametrize("code", SCRIPTS)
def test_a_script_runs(code: str, tmp_path: Path) -> None:
    module = "transformers" if "transformers" in code else "accelerate"
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    printed = done.stdout.strip().splitlines()[-1]
    found = ast.literal_eval(re.search(r"\{.*?\}", printed)[0])  # type: ignore[index]
    if module == "transformers":
        assert found["grad_norm_clipped"] == pytest.approx(min(found["grad_norm"], 0.5), rel=1e-5)
        assert (found["clip_threshold"], found["skipped"]) == (0.5, 0.0)
    else:
        assert (found["threshold"], printed.rpartition(" ")[2]) == (1.0, "2")
