"""What a reader's pointer does to the charts of the report's page, and what is seen of many layers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.monitor.browser import Browser
from tests.monitor.page_reading import report
from tests.monitor.synthetic import metric_row, write_lines

STEPS, LAYERS = 50, 20
RANGES = "figures.filter((each) => each.kind !== 'spread').map((each) => [...place(each).layout.xaxis.range])"
MAP = "figures.find((each) => each.kind === 'heat')"

# In the page: two clicks are a double click within half a second only, which a busy machine takes for each.
DOUBLE_CLICK = """(() => {
  const at = { clientX: %f, clientY: %f, buttons: 1, bubbles: true };
  for (let click = 0; click < 2; click++) {
    document.querySelector(".plot.heat .nsewdrag").dispatchEvent(new MouseEvent("mousedown", at));
    document.dispatchEvent(new MouseEvent("mouseup", at));
  }
})()"""


def written(folder: Path, layers: int, broken: tuple[int, int] = (0, 0)) -> Path:
    """A run whose layers have the norms 1, 2, ...; the one at (step, layer) is not finite."""
    write_lines(folder / "metrics.jsonl", (metric_row(step, 1.0 + step % 7) for step in range(1, STEPS + 1)))
    rows = (
        {"step": step, "layer": f"l{of}", "norm": "inf" if (step, of) == broken else 1.0 + of}
        for step in range(1, STEPS + 1)
        for of in range(layers)
    )
    write_lines(folder / "layers.jsonl", rows)
    return report(folder)


def in_map(browser: Browser, step: float, row: float) -> tuple[float, float]:
    """Where a step and a row of the whole map of layers are in the window."""
    left, top, width, height = browser.run(
        """(() => {
          const canvas = document.querySelector(".plot.heat canvas");
          canvas.scrollIntoView({ block: "center", behavior: "instant" });
          const box = canvas.getBoundingClientRect();
          return [box.left, box.top, box.width, box.height];
        })()"""
    )
    first, last = browser.run(f"sight({MAP})")
    return left + width * (step - first) / (last - first), top + height * (row + 0.5) / LAYERS


def settled(browser: Browser) -> Any:
    time.sleep(0.2)  # plotly tells of a change in a later task
    browser.settle()
    return browser.run(RANGES)


@pytest.mark.slow
def test_a_click_picks_a_layer_a_drag_zooms_all_charts_and_a_double_click_brings_all_back(
    browser: Browser, folder: Path
) -> None:
    browser.open(written(folder, LAYERS))
    picked, rows = "document.querySelector('select[data-run]').value", f"place({MAP}).layout.yaxis.range"
    whole = browser.run(RANGES)
    browser.drag(in_map(browser, 20, 7))
    assert browser.run("document.querySelector('.tip').innerText.split('\\n')") == [
        "l7",
        "steps 20",
        "norm 8",
    ]
    assert browser.run(picked) == "7"
    browser.drag(*(in_map(browser, step, row) for step, row in ((10, 3), (20, 6), (30, 12))))
    found = settled(browser)
    assert len(found) == len(whole) and {tuple(each) for each in found} == {tuple(found[0])}
    assert found[0] == pytest.approx([10, 30], abs=0.3)
    assert browser.run(rows) == pytest.approx([12, 3], abs=0.3)
    assert browser.run(picked) == "7", "a drag picks nothing"
    browser.run("redraw(figures)")
    settled(browser)
    assert browser.run(rows) == pytest.approx([12, 3], abs=0.3), "rows stay in sight when there is news"
    browser.run(DOUBLE_CLICK % in_map(browser, 20, 7))
    assert settled(browser) == whole
    assert browser.run(rows) == [LAYERS - 0.5, -0.5]
    assert browser.complaints == []


@pytest.mark.slow
def test_the_last_of_many_wishes_is_drawn_once(browser: Browser, folder: Path) -> None:
    browser.open(written(folder, LAYERS))
    browser.run("drawn = 0; const once = draw; draw = (figure) => { drawn++; once(figure); }")
    browser.run("for (let to = 10; to <= 40; to++) showSteps('run0', [5, to])")
    assert settled(browser) == [[5, 40]] * len(browser.run(RANGES))
    assert browser.run("drawn") == len(browser.run(RANGES))


@pytest.mark.slow
def test_one_norm_that_is_not_finite_is_seen_among_a_thousand_layers(browser: Browser, folder: Path) -> None:
    browser.open(written(folder, 999, broken=(25, 610)))
    red = """(() => {
      const canvas = document.querySelector(".plot.heat canvas"), { width, height } = canvas;
      const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
      const found = [];
      for (let at = 0; at < data.length; at += 4)
        if (data[at] === 255 && data[at + 1] === 64 && data[at + 2] === 64) found.push(at / 4);
      return [height, found.map((at) => Math.floor(at / width)), found.map((at) => at % width / width)];
    })()"""
    height, rows, places = browser.run(red)
    assert height < 999, "fewer pixels than layers"
    assert set(rows) == {round(height * 610 / 999)}
    assert min(places) < 25 / STEPS < max(places) + 0.01
