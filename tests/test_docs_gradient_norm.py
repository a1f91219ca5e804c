"""Every number in docs/gradient-norm.md is recomputed here."""

from __future__ import annotations

import doctest
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

DOC = Path(__file__).parent.parent / "docs" / "gradient-norm.md"
TEXT = DOC.read_text(encoding="utf-8")
TRUE_NORM = 15.0


def _blocks() -> Iterator[tuple[int, str]]:
    for match in re.finditer(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        yield TEXT[: match.start(1)].count("\n"), match.group(1)


def _table(marker: str) -> list[list[str]]:
    """The rows, without the header, of the table under a comment."""
    after = TEXT.split(f"<!-- {marker}:", 1)[1].split("-->", 1)[1].strip()
    rows = after.split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_examples_give_what_they_show() -> None:
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(verbose=False)
    names: dict[str, Any] = {}
    for line, block in _blocks():
        test = doctest.DocTest(parser.get_examples(block), names, DOC.name, str(DOC), line, block)
        runner.run(test, clear_globs=False)
        names = test.globs
    results = runner.summarize(verbose=False)
    assert results.attempted > 30
    assert results.failed == 0


def test_every_python_block_is_an_example() -> None:
    assert all(block.startswith(">>> ") for _, block in _blocks())


@pytest.mark.parametrize("row", _table("worked"), ids=lambda row: f"{row[0]}: {row[1]}")
def test_worked_mistakes(row: list[str]) -> None:
    _, _, formula, gives, ratio = row
    value = eval(formula.strip("`"), {"__builtins__": {}, "sqrt": math.sqrt})
    assert f"{value:.3f}" == gives
    assert f"{value / TRUE_NORM:.4f}" == ratio


def test_measured_errors() -> None:
    """Within a factor of 10: how many partial sums a kernel keeps depends on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for elements, constant, normal in _table("measured"):
            n = int(float(elements))
            tenths = torch.full((n,), 0.1)
            assert _agree(float(constant), _error(tenths, float(tenths[0]) * math.sqrt(n)))
            drawn = torch.randn(n, generator=torch.Generator().manual_seed(0))
            assert _agree(float(normal), _error(drawn, float(drawn.double().norm())))
    finally:
        torch.set_num_threads(threads)


def _error(tensor: torch.Tensor, true: float) -> float:
    return abs(float(torch.linalg.vector_norm(tensor)) / true - 1)


def _agree(said: float, found: float) -> bool:
    return said / 10 <= found <= said * 10


def test_limits_of_squares() -> None:
    """The magnitudes beyond which a square over- or underflows, as the text rounds them."""
    half, single = torch.finfo(torch.float16), torch.finfo(torch.float32)
    squares = torch.tensor([255.875, 256.0], dtype=torch.float16).square()  # neighbours in fp16
    assert squares.isinf().tolist() == [False, True] and "of 256 and more overflow" in TEXT
    assert f"{math.sqrt(half.smallest_normal * half.eps / 2):.1e}" == "1.7e-04" and "below 1.7e-4" in TEXT
    assert f"{math.sqrt(single.max):.1e}" == "1.8e+19" and "1.8e19" in TEXT
    assert f"{math.sqrt(single.smallest_normal * single.eps / 2):.1e}" == "2.6e-23" and "2.6e-23" in TEXT


def test_contents_and_links_lead_somewhere() -> None:
    headings = re.findall(r"^## (.+)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    targets = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert {target[1:] for target in targets if target.startswith("#")} == anchors
    for target in targets:
        assert target.startswith(("#", "https://arxiv.org/abs/")) or (DOC.parent / target).exists()
