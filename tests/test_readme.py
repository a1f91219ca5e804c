"""README's Python is run as it stands, and the tests that it names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_examples_run_one_after_the_other() -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
    assert "GradClipper" in code
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "'was_clipped'" in result.stdout


def test_named_files_and_topologies_exist() -> None:
    files = set(re.findall(r"`((?:tests|configs|docs|launch|benchmarks)/[\w./-]+)", README))
    assert len(files) > 5
    assert not [name for name in files if not (ROOT / name).exists()]
    topologies = set(re.findall(r"\[(\w+)\]`", README))
    assert len(topologies) > 10
    assert not [name for name in topologies if not (ROOT / "configs" / f"{name}.yaml").exists()]
