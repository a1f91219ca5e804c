"""The report's page, opened in Chromium without a network: what is drawn, its colours, and what keys do."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.monitor.browser import Browser
from tests.monitor.page_reading import cells, colour, contrast, points, report, rows, texts
from tests.monitor.synthetic import metric_row, write_lines, write_run

STEPS, LAYERS, EVERY = 400, 40, 2
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)><b>%{x} $a$ <a href='https://evil.example'>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "base", STEPS, LAYERS, EVERY)


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return report(run)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_is_drawn_without_a_network_in_either_scheme(
    browser: Browser, run: Path, page: Path, scheme: str
) -> None:
    browser.open(page, scheme)
    steps, layers = rows(run), rows(run, "layers.jsonl")
    clipped = sum(step["clipped"] for step in steps)
    skipped = sum(step["skipped"] for step in steps)
    broken = sum(not step["finite"] for step in steps)
    assert min(clipped, skipped, broken) > 0
    assert points(browser, "Gradient norm") == {
        "norm before clipping": -1,
        "threshold": -1,
        "clipped": clipped,
        "skipped": skipped,
        "not finite": broken,
    }
    assert browser.run("document.querySelectorAll('.plot .main-svg').length") >= 7
    lines = "[...document.querySelectorAll('.plot.steps .trace')].filter((e) => e.querySelector('.js-line'))"
    assert browser.run(f"{lines}.length") == 7, (
        "norm, threshold, loss, rate, throughput, clip rate, coefficient"
    )
    assert browser.run("document.querySelectorAll('.boxlayer path.box').length") == LAYERS
    picture = cells(browser)
    assert (len(picture), len(picture[0])) == (LAYERS, len({row["step"] for row in layers}))
    assert len({tuple(pixel) for row in picture for pixel in row}) > 50
    background, text = colour(browser, "body", "background-color"), colour(browser, ".plot text", "fill")
    assert (sum(background) > 600) == (scheme == "light")
    assert contrast(background, text) >= 7
    assert contrast(background, colour(browser, ".chart > p", "color")) >= 4.5
    assert contrast(background, colour(browser, "main a, nav a", "color")) >= 3
    for id in browser.run("figures.filter((each) => each.kind === 'steps').map((each) => each.id)"):
        assert contrast(background, colour(browser, f"#{id} path.js-line", "stroke")) >= 3, id
    assert browser.complaints == []
    assert [url[:40] for url in browser.requests if not url.startswith(("data:", "file:"))] == []
    assert [url for url in browser.requests if url.startswith("file:")] == [page.resolve().as_uri()]


def test_the_heat_map_shows_the_norms_of_the_file(browser: Browser, folder: Path) -> None:
    norms = [[1e-6, 1e-4, 1e-2], [1e-2, 1e-4, 1e-6], [0.0, math.nan, 1e-3]]
    write_lines(folder / "metrics.jsonl", (metric_row(step, 1.0) for step in (1, 2, 3)))
    layers = (
        {"step": step, "layer": f"layer{row}", "norm": norms[row][step - 1]}
        for step in (1, 2, 3)
        for row in range(3)
    )
    write_lines(folder / "layers.jsonl", layers)
    browser.open(report(folder))
    assert browser.complaints == []
    colours = cells(browser)
    brightness = [[sum(pixel[:3]) * (pixel[3] > 0) for pixel in row] for row in colours]
    assert 0 < brightness[0][0] < brightness[0][1] < brightness[0][2], "viridis grows brighter"
    assert brightness[1] == brightness[0][::-1]
    assert (colours[0][0], colours[0][2]) == ([68, 1, 84, 255], [253, 231, 37, 255]), (
        "from its first to its last"
    )
    assert colours[2] == [[255, 255, 255, 255], [255, 64, 64, 255], colours[2][2]], "zero, and nan"
    assert brightness[0][0] < brightness[2][2] < brightness[0][2]
    assert [each["textContent"] for each in texts(browser, ".key span")] == ["all zero", "not finite"]
    assert browser.run("document.querySelectorAll('.plot.heat .yaxislayer-above text').length") == 3


def test_the_band_of_all_layers_survives_a_step_without_norms(browser: Browser, folder: Path) -> None:
    steps = range(1, 11)
    write_lines(folder / "metrics.jsonl", (metric_row(step, 1.0) for step in steps))
    rows = ((step, name, math.nan if step == 6 else 10.0**name) for step in steps for name in range(3))
    layers = ({"step": step, "layer": f"l{name}", "norm": norm} for step, name, norm in rows)
    write_lines(folder / "layers.jsonl", layers)
    browser.open(report(folder))
    box = browser.run(
        """(() => {
          const band = document.querySelector(".plot.picked .js-fill").getAttribute("d");
          const points = band.match(/[\\d.]+,[\\d.]+/g).map((point) => point.split(",").map(Number));
          return [band.split("M").length - 1, [...new Set(points.map(([x]) => x))].length,
                  [...new Set(points.map(([, y]) => y))].length];
        })()"""
    )
    assert box[0] == 1
    assert box[1:] == [2, 2], "simplified by plotly, a rectangle from the lowest layer to the highest"


def test_the_keyboard_is_enough(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.press("Tab", 9)
    assert browser.run("document.activeElement.className") == "skip"
    browser.press("Enter", 13, "\r")
    assert browser.run("document.activeElement.id") == "content"
    browser.run("document.getElementById('theme').focus()")
    browser.press("Enter", 13, "\r")
    assert browser.run("document.documentElement.dataset.theme") == "dark"
    browser.settle()
    assert browser.run("document.getElementById('theme').getAttribute('aria-pressed')") == "true"
    assert sum(colour(browser, "body", "background-color")) < 200 < sum(colour(browser, ".plot text", "fill"))
    browser.run("document.querySelector('select[data-run]').focus()")
    before = browser.run("document.querySelector('select[data-run]').selectedIndex")
    browser.press("ArrowDown", 40)
    chosen = browser.run("document.querySelector('select[data-run]').selectedOptions[0].textContent")
    assert browser.run("document.querySelector('select[data-run]').selectedIndex") == before + 1
    assert [each["textContent"] for each in texts(browser, ".picked .legendtext")] == [
        chosen,
        "90% of layers",
    ]
    for field, value in (("first", 100), ("last", 200)):
        browser.run(f"document.querySelector('form[data-run]').elements.{field}.focus()")
        browser.run(f"document.querySelector('form[data-run]').elements.{field}.value = {value}")
    browser.press("Enter", 13, "\r")
    shown = "[...document.querySelectorAll('.plot')].map((each) => each.layout.xaxis.range)"
    browser.settle()
    assert browser.run(shown)[:8] == [[99.5, 200.5]] * 8
    assert browser.complaints == []


def test_every_chart_has_a_name_words_and_a_table(browser: Browser, page: Path) -> None:
    browser.open(page)
    charts = browser.run(
        """[...document.querySelectorAll(".plot")].map((plot) => ({
          name: document.getElementById(plot.getAttribute("aria-labelledby")).textContent,
          says: document.getElementById(plot.getAttribute("aria-describedby")).textContent,
          rows: plot.parentElement.querySelectorAll("details tbody tr").length}))"""
    )
    assert [chart["name"] for chart in charts] == [
        "Gradient norm",
        "Loss",
        "Learning rate",
        "Throughput",
        "Clip rate",
        "Clip coefficient",
        "Layers over steps",
        "One layer",
        "Spread of each layer",
    ]
    assert all(chart["says"] and (chart["rows"] or chart["name"] == "One layer") for chart in charts)
    assert browser.run("document.querySelectorAll('h1').length") == 1
    assert browser.run("['header', 'nav', 'main'].every((name) => document.querySelector(name))")
    broken = "[...document.querySelectorAll('nav a')].filter((each) => !document.querySelector(each.hash))"
    assert browser.run(f"{broken}.length") == 0


def doctor_facts(layers: int) -> dict[str, Any]:
    """A doctor's report of a model, every fifth of whose layers is wrong; the last one's gradient is zero."""
    text = "partial, never reduced over tp: the 2 ranks' gradients add up to the right one"
    found = [{"mistake": "not reduced", "text": text, "ranks": [0, 1], "others": []}]
    numbers: dict[str, Any] = {"difference": 0.5, "tolerance": 1e-6, "cosine": 0.98, "scale": 0.5}
    parameters = [
        {
            "name": f"blocks.{place}.attention.norm.{part}",
            **numbers,
            "is_dead": place == layers - 1,
            "explanations": found if place % 5 == 2 else [],
        }
        for place in range(layers)
        for part in ("weight", "bias")
    ]
    cause = {"where": parameters[4]["name"], "explanation": found[0]}
    return {"ok": False, "ranks": 2, "parameters": parameters, "cause": cause, "notes": ["dropout was off"]}


@pytest.mark.parametrize(("scheme", "width"), [("dark", 390), ("light", 1280)])
def test_what_a_doctor_found_is_seen_on_a_phone_and_on_a_wide_screen(
    browser: Browser, folder: Path, scheme: str, width: int
) -> None:
    write_lines(folder / "metrics.jsonl", (metric_row(step, 1.0) for step in (1, 2, 3)))
    (folder / "doctor.json").write_text(json.dumps(doctor_facts(60)))
    browser.open(report(folder), scheme, width)
    assert browser.run("document.scrollingElement.scrollWidth") <= width
    assert browser.run("document.querySelector('.notice').textContent").startswith("24 of 120 gradients")
    chips = [each["textContent"] for each in texts(browser, ".examined li")]
    assert len(chips) == 12 + 11 + 4, "each wrong one, and the right ones between two of them together"
    assert chips[0] == "blocks.0.attention.norm" and "4 layers right" in chips[3]
    row = ".explained tbody tr:first-child"
    left, right, lines = browser.run(
        f"""(() => {{ const cell = document.querySelector("{row} td"), box = cell.getBoundingClientRect();
              const line = parseFloat(getComputedStyle(cell).lineHeight);
              return [box.left, box.right, box.height / line]; }})()"""
    )
    assert 0 <= left < right <= width, "beside the name, without scrolling"
    assert (lines > 3) == (width < 500), "wrapped, not cut off"
    said = [each["textContent"] for each in texts(browser, ".explained td:nth-child(2)")]
    assert said[0].startswith("not reduced: partial") and set(said[1:]) == {"the same"}
    background = colour(browser, "article:has(.examined)", "background-color")
    for words in (".verdict", ".examined li", ".examined span", ".explained td"):
        assert contrast(background, colour(browser, words, "color")) >= 4.5
    assert browser.complaints == []


def test_it_fits_a_narrow_screen_and_paper(browser: Browser, page: Path) -> None:
    browser.open(page, "dark", width=400)
    assert browser.run("document.scrollingElement.scrollWidth") <= 400
    assert (
        browser.run("Math.max(...[...document.querySelectorAll('.main-svg')].map((e) => e.clientWidth))")
        < 400
    )
    browser.run("dispatchEvent(new Event('beforeprint'))")
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert colour(browser, "body", "background-color") == (255, 255, 255)
    assert sum(colour(browser, ".plot text", "fill")) < 200
    assert browser.run("document.querySelector('details.config').open")
    hidden = "nav, .skip, #theme, .controls, .chart details"
    assert browser.run(f"[...document.querySelectorAll('{hidden}')].every((e) => e.offsetParent === null)")
    browser.call("Emulation.setEmulatedMedia", media="")
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run("document.querySelector('details.config').open") is False
    assert browser.complaints == []


def test_nothing_in_a_run_becomes_markup_or_script(browser: Browser, tmp_path: Path) -> None:
    folder = tmp_path / "<b>run<script>"
    folder.mkdir()
    groups = {EVIL: {"grad_norm": 1.0, "clip_coef": 1.0, "threshold": "inf"}}
    write_lines(folder / "metrics.jsonl", (metric_row(step, 1.0, groups=groups) for step in range(1, 9)))
    layers = ({"step": step, "layer": name, "norm": step} for step in range(1, 9) for name in (EVIL, "@blue"))
    write_lines(folder / "layers.jsonl", layers)
    alert = {
        "step": 1,
        "kind": EVIL,
        "layer": EVIL,
        "ranks": [EVIL],
        "value": 1,
        "bound": None,
        "message": EVIL,
    }
    write_lines(folder / "alerts.jsonl", iter([alert]))
    (folder / "config.yaml").write_text(f'a: "{EVIL}"\n')
    browser.open(report(folder))
    assert browser.complaints == []
    assert browser.run("document.querySelectorAll('main script, main img, .plot a, main b').length") == 0
    assert texts(browser, "h2")[0]["textContent"] == "<b>run<script>"
    assert texts(browser, "select[data-run] option") == [{"textContent": EVIL}, {"textContent": "@blue"}]
    assert texts(browser, ".alerts td:last-child") == [{"textContent": EVIL}]
    assert texts(browser, "pre") == [{"textContent": f'a: "{EVIL}"\n'}]
    assert texts(browser, ".picked .legendtext")[0]["textContent"].startswith("</script><script>")
    assert texts(browser, ".plot.heat .yaxislayer-above text")[1]["textContent"] == "@blue"


def test_odd_runs_are_said_to_be_so(browser: Browser, tmp_path: Path) -> None:
    odd: dict[str, tuple[list[float], str]] = {
        "none": ([], "No step was written yet, so there is nothing to draw."),
        "one": ([2.0], "1 step, 1 of them clipped"),
        "nan": ([math.nan] * 3, "None of 3 steps has a finite norm, so there is nothing to draw."),
        "zero": ([0.0, 0.0], "2 steps; every finite norm is zero."),
        "far": ([1e-30, 1e30, math.inf], "3 steps, 1 of them clipped, 0 skipped, 1 not finite."),
    }
    for name, (norms, _) in odd.items():
        (tmp_path / name).mkdir()
        steps = list(enumerate(norms, 1))
        write_lines(tmp_path / name / "metrics.jsonl", (metric_row(*step) for step in steps))
        layers = ({"step": step, "layer": "only", "norm": norm} for step, norm in steps)
        write_lines(tmp_path / name / "layers.jsonl", layers)
    browser.open(report(*(tmp_path / name for name in odd)))
    assert browser.complaints == []
    found = browser.run(
        """[...document.querySelectorAll("section")].slice(1).map((each) => [
          each.querySelector(".chart p").textContent, each.querySelector(".chart .main-svg") !== null])"""
    )
    for (says, drawn), (norms, said) in zip(found, odd.values(), strict=True):
        assert says.startswith(said)
        assert drawn or not norms
    sections = "[...document.querySelectorAll('section')].slice(1)"
    firsts = f"{sections}.map((each) => each.querySelector('.charts .chart'))"
    drawn = browser.run(f"{firsts}.map((each) => each.querySelector('.main-svg') !== null)")
    assert drawn == ["nothing to draw" not in said for _, said in odd.values()]


def test_no_threshold_no_layers_no_alerts_no_config(browser: Browser, folder: Path) -> None:
    write_lines(folder / "metrics.jsonl", (metric_row(step, 1.0, threshold=math.inf) for step in (1, 2, 3)))
    browser.open(report(folder))
    text = browser.run("document.querySelector('main').textContent")
    for said in ("There is no threshold", "no layer rows", "no alerts.jsonl", "no config.yaml"):
        assert said in text
    assert points(browser, "Gradient norm") == {}, "one line needs no legend"
    assert browser.complaints == []


def test_several_runs_are_compared(browser: Browser, run: Path) -> None:
    other = write_run(run.parent / "other", STEPS, 8, 20, seed=1, lr=6e-3)
    browser.open(report(run, other))
    assert browser.complaints == []
    assert points(browser, "Gradient norms") == {"base": -1, "other": -1}
    assert points(browser, "Losses") == {"base": -1, "other": -1}
    differences = browser.run(
        """[...document.querySelectorAll("article")]
           .find((each) => each.textContent.startsWith("Differences in"))
           .querySelectorAll("tbody tr").length"""
    )
    assert differences == 3, "seed, learning rate, monitor.every"
    strokes = browser.run(
        """[...document.querySelector(".plot.compare").querySelectorAll("path.js-line")]
           .map((each) => each.style.stroke)"""
    )
    assert len(set(strokes)) == 2
