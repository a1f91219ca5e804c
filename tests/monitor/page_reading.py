"""What the tests of the report's page ask of it: marks, colours, pixels, texts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from distnorm import cli
from tests.monitor.browser import Browser


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def report(*runs: Path) -> Path:
    page = runs[0].parent / f"{'-'.join(run.name for run in runs)}.html"
    assert cli.main(["report", *map(str, runs), "-o", str(page)]) == 0
    return page


def points(browser: Browser, title: str) -> dict[str, int]:
    """How many marks each trace of a chart draws, by the names in its legend; -1 where it draws a line."""
    found = browser.run(
        f"""(() => {{
          const heading = [...document.querySelectorAll("h3")].find((each) => each.textContent === {title!r});
          const plot = heading.parentElement.querySelector(".plot");
          const names = [...plot.querySelectorAll(".legendtext")].map((each) => each.textContent);
          const traces = [...plot.querySelectorAll(".scatterlayer .trace")];
          const marks = traces.map((each) => each.querySelectorAll("path.point").length);
          const lines = traces.map((each) => each.querySelectorAll("path.js-line").length);
          return Object.fromEntries(names.map((name, place) => [name, marks[place] || -(lines[place] > 0)]));
        }})()"""
    )
    assert isinstance(found, dict)
    return found


def colour(browser: Browser, selector: str, name: str) -> tuple[float, ...]:
    text = browser.run(f"getComputedStyle(document.querySelector({selector!r})).getPropertyValue({name!r})")
    return tuple(float(part) for part in re.findall(r"[\d.]+", text)[:3])


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """WCAG 2's ratio of two sRGB colours: 1 is alike, 21 is black on white."""

    def light(each: tuple[float, ...]) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in each)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def cells(browser: Browser) -> list[list[list[int]]]:
    """The colours (RGBA) in the middle of each of the heat map's cells, as they are on the screen."""
    found = browser.run(
        """(() => {
          const figure = figures.find((each) => each.kind === "heat"), div = place(figure);
          const { edges, picture: { width, height } } = mapOf(figure), [from, to] = div.layout.xaxis.range;
          const canvas = div.querySelector("canvas");
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          const middle = (column) => (edges[column] + edges[column + 1]) / 2;
          const x = (column) => Math.floor(canvas.width * (middle(column) - from) / (to - from));
          const y = (row) => Math.floor(canvas.height * (row + 0.5) / height);
          return Array.from({ length: height }, (_, row) => Array.from({ length: width }, (_, column) => {
            const at = 4 * (y(row) * canvas.width + x(column));
            return [...data.slice(at, at + 4)];
          }));
        })()"""
    )
    return list(found)


def texts(browser: Browser, selector: str) -> list[dict[str, str]]:
    found = browser.run(
        f"[...document.querySelectorAll({selector!r})].map((each) => ({{textContent: each.textContent}}))"
    )
    return list(found)
