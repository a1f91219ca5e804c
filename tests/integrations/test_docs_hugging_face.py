"""The scripts of docs/integrations.md for transformers and Accelerate are run as they stand."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
SCRIPTS = [
    pytest.param(code, id=f"{title}-{number}")
    for title in ("transformers", "Accelerate")
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", SECTIONS[title], re.DOTALL))
]


@pytest.mark.filterwarnings("ignore")  # the frameworks' own
@pytest.mark.parametrize("code", SCRIPTS)
def test_a_script_runs(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    exec(code, {"__name__": "__main__"})
    AcceleratorState._reset_state(reset_partial_state=True)
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    found = ast.literal_eval(re.search(r"\{.*?\}", printed)[0])  # type: ignore[index]
    if "transformers" in code:
        assert found["grad_norm_clipped"] == pytest.approx(min(found["grad_norm"], 0.5), rel=1e-5)
        assert (found["clip_threshold"], found["skipped"]) == (0.5, 0.0)
    else:
        assert (found["threshold"], printed.rpartition(" ")[2]) == (1.0, "2")
