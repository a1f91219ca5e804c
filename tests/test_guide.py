"""The guide: its code is run, its numbers are compared with the runs, its pictures and its site are made."""

from __future__ import annotations

import doctest
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distnorm.config.policy_models import NAMES
from tests.monitor import browser

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [DOCS / "index.md", *sorted((DOCS / "guide").glob("*.md"))]
TEXTS = {page.relative_to(DOCS).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
NUMBER = re.compile(r"([-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)( ?%)?<!-- =(.+?) -->")
drawn = pytest.mark.skipif(
    any(
        importlib.util.find_spec(name) is None
        for name in ("matplotlib", "mkdocs", "material", "latex2mathml")
    ),
    reason="needs the docs extra: pip install -e '.[docs]'",
)


SEARCH = """(async () => {
    const query = document.querySelector("[data-md-component=search-query]");
    query.focus();
    query.value = "second moment";
    query.dispatchEvent(new Event("input", {bubbles: true}));
    query.dispatchEvent(new KeyboardEvent("keyup", {bubbles: true}));
    for (let i = 0; i < 200 && !document.querySelector(".md-search-result__item"); i++)
        await new Promise((resolve) => setTimeout(resolve, 100));
    return [...document.querySelectorAll(".md-search-result__item h1")].map((title) => title.innerText);
})()"""


class Numbers:
    """A run's numbers: `run.name`, or `run["a name"]` where it is no identifier."""

    def __init__(self, numbers: dict[str, Any]) -> None:
        self._numbers = numbers

    def __getitem__(self, name: str) -> Any:
        found = self._numbers[name]
        return Numbers(found) if isinstance(found, dict) else found

    def __getattr__(self, name: str) -> Any:
        return self[name]


def recorded() -> dict[str, Any]:
    files = (DOCS / "pictures" / "data").glob("*.json")
    runs = {file.stem: Numbers(json.loads(file.read_text(encoding="utf-8"))) for file in files}

    def finfo(name: str) -> torch.finfo:
        return torch.finfo(getattr(torch, name))

    def tiny(name: str) -> float:
        return finfo(name).smallest_normal * finfo(name).eps

    return {**runs, "sqrt": math.sqrt, "log": math.log, "finfo": finfo, "tiny": tiny, "__builtins__": {}}


def agrees(shown: str, percent: bool, value: float) -> bool:
    """Whether a number is rounded to what is shown: to half a unit of its last digit."""
    plain = shown.replace(",", "")
    digits, _, exponent = plain.partition("e")
    places = len(digits.partition(".")[2])
    unit = 10.0 ** (int(exponent or 0) - places)
    return abs(float(plain) - value * (100 if percent else 1)) <= 0.501 * unit


def blocks(text: str) -> Iterator[tuple[int, str]]:
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: match.start(1)].count("\n"), match.group(1)


def run_page(name: str, text: str) -> tuple[int, int]:
    """Examples and failures of a page, all of whose blocks share their names."""
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(verbose=False)
    names: dict[str, Any] = {"__name__": "guide"}
    for line, block in blocks(text):
        if block.startswith(">>> "):
            test = doctest.DocTest(parser.get_examples(block), names, name, name, line, block)
            runner.run(test, clear_globs=False)
            names = test.globs
        else:
            exec(compile("\n" * line + block, name, "exec"), names)
    results = runner.summarize(verbose=False)
    return results.attempted, results.failed


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if "```python" in text])
def test_the_code_of_a_page_runs_and_gives_what_it_shows(name: str) -> None:
    assert run_page(name, TEXTS[name])[1] == 0


def test_the_comments_of_code_that_prints_are_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    run_page("mesh", TEXTS["guide/mesh.md"])
    said = re.findall(r"^print\(.*\)  # (.+)$", TEXTS["guide/mesh.md"], re.MULTILINE)
    assert said == capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", list(TEXTS))
def test_numbers_are_those_of_the_runs(name: str) -> None:
    names = recorded()
    wrong = [
        (shown + (percent or ""), source, value)
        for shown, percent, source in NUMBER.findall(TEXTS[name])
        if not agrees(shown, bool(percent), value := eval(source, names))
    ]
    assert wrong == []


def prose(text: str) -> str:
    """A page without code, formulas, links, headings, quotations, and the numbers that have a source."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(
        r'^#.*$|\*".*?"\*', "", NUMBER.sub("", text), flags=re.MULTILINE | re.DOTALL
    )  # headings, quotations
    text = re.sub(r"[-\d.]+<!-- ~\w+ -->", "", text)
    for pattern in (
        r"\$\$.*?\$\$",
        r"\$[^$\n]+\$",
        r"`[^`\n]+`",
        r"\]\([^)\s]+\)",
        r"!\[[^]]*\]",
        r"<[^>]+>",
    ):
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    return text


@pytest.mark.parametrize("name", [n for n in TEXTS if "bibliography" not in n])
def test_every_decimal_has_a_source(name: str) -> None:
    allowed = {"1.0", "0.0"}  # settings' names in prose
    found = [
        number
        for number in re.findall(r"(?<![\w.-])\d+\.\d+(?![\w.])", prose(TEXTS[name]))
        if number not in allowed
    ]
    assert found == []


def test_a_wrong_number_and_one_without_a_source_are_found() -> None:
    assert not agrees("2.05", False, 2.0438)
    assert agrees("2.04", False, 2.0438) and agrees("12", True, 0.1234) and agrees("1.8e-6", False, 1.7767e-6)
    assert re.findall(r"\d+\.\d+", prose("a 3.14 `2.7` $1.5$ 2.5<!-- =x -->")) == ["3.14"]


def test_sources_are_in_the_bibliography() -> None:
    listed = set(re.findall(r"https?://[^)\s]+", TEXTS["guide/bibliography.md"]))
    used = {link for text in TEXTS.values() for link in re.findall(r"\]\((https?://[^)\s]+)\)", text)}
    assert used - listed == set()
    assert len(listed) > 60


def test_the_table_of_policies_has_all_of_them() -> None:
    text = (DOCS / "configuration.md").read_text(encoding="utf-8").partition("## Policies")[2]
    assert re.findall(r"^\| `(\w+)` \|", text.partition("\n\n")[2], re.MULTILINE) == list(NAMES)


def test_pictures_are_used_and_described() -> None:
    pages = {**TEXTS, "gradient-norm.md": (DOCS / "gradient-norm.md").read_text(encoding="utf-8")}
    used = [
        found
        for text in pages.values()
        for found in re.findall(r"!\[([^]]*)\]\([^)]*img/([\w-]+)\.svg\)\n?(\*?)", text)
    ]
    assert all(len(alt) > 20 and caption for alt, _, caption in used)
    readme = re.findall(r"img/([\w-]+)\.svg", (ROOT / "README.md").read_text(encoding="utf-8"))
    there = {file.stem for file in (DOCS / "img").glob("*.svg")}
    assert {name for _, name, _ in used} | set(readme) == there
    assert len(there) >= 25


@drawn
@pytest.mark.slow
def test_pictures_are_what_the_scripts_draw(tmp_path: Path) -> None:
    from docs.pictures import make

    constraints = (ROOT / "launch" / "constraints.txt").read_text(encoding="utf-8")
    (pinned,) = re.findall(r"^matplotlib==([\d.]+)", constraints, re.MULTILINE)
    if importlib.metadata.version("matplotlib") != pinned:
        pytest.skip(f"other versions draw other bytes: pip install matplotlib=={pinned}, on Python 3.11 on")

    data, pictures = make.load(), make.collect("PICTURES")
    assert set(pictures) == {file.stem for file in (DOCS / "img").glob("*.svg")}
    some = sorted(pictures)[::3]  # docs/build.sh draws them all
    drawn = {name: make.draw(name, pictures[name], data, tmp_path).read_bytes() for name in some}
    differ = [name for name in some if drawn[name] != (DOCS / "img" / f"{name}.svg").read_bytes()]
    assert differ == []


@drawn
@pytest.mark.parametrize("name", ["cliff", "depth", "optimizers", "sums", "width"])
def test_a_run_can_be_repeated(name: str) -> None:
    """Within what another machine's roundings may change. docs/build.sh --runs repeats the longer ones."""
    from docs.pictures import make

    assert _close(make.run(make.collect("RUNS")[name]), make.load()[name])


def _close(new: Any, old: Any) -> bool:
    if isinstance(old, dict):
        return set(new) == set(old) and all(_close(new[key], old[key]) for key in old)
    if isinstance(old, list):
        return len(new) == len(old) and all(map(_close, new, old))
    if isinstance(old, float):
        return math.isclose(new, old, rel_tol=0.02, abs_tol=1e-4)
    return bool(new == old)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a warning fails."""
    folder = tmp_path_factory.mktemp("site")
    command = [str(DOCS / "build.sh"), "--no-draw", "--site", str(folder)]
    environ = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr[-3000:]
    return folder


@drawn
@pytest.mark.skipif(browser.find() is None, reason="needs Chromium")
@pytest.mark.slow
def test_the_site_is_searched_from_a_folder_without_a_network(site: Path, tmp_path: Path) -> None:
    page = browser.Browser(str(browser.find()), tmp_path)
    try:
        page.open(site / "guide" / "clipping.html", ready="document.readyState === 'complete'")
        found = page.run(SEARCH)
        assert "Glossary" in found and "What clipping does" in found
        assert page.run("document.querySelectorAll('figure svg').length") >= 5
        assert page.complaints == []
        assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
    finally:
        page.close()


@drawn
@pytest.mark.slow
def test_no_page_needs_the_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert not re.findall(r'(?:src|href)="https?://[^"]+\.(?:js|css|woff2?|png|svg)', html), page
        assert "<!-- =" not in html and r"\(" not in re.sub(
            r"<script.*?</script>|<code.*?</code>", "", html, flags=re.DOTALL
        )
