"""How long a reader of `distnorm watch` waits.

`PYTHONPATH=. python benchmarks/watch_page.py [STEPS LAYERS EVERY]` serves a made-up run (5,000 steps, 300
layers on every 5th of them by default; most steps are clipped, as each of those is a mark), opens it in
headless Chromium, does everything that a reader does, and lets new rows come. For each the longest task of
the page's main thread is printed: its time on the wall, and on the processor, which other programs lengthen
less. The median and the largest of three.
A reader notices nothing under 100 ms (Nielsen 1993; Chrome's INP calls 200 good).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from distnorm.monitor.watch.answers import Answers
from distnorm.monitor.watch.follower import follow
from distnorm.monitor.watch.server import Server
from tests.monitor.browser import Browser, find
from tests.monitor.synthetic import write_run

LIMIT = 100.0
TIMES = 3
# Each is given the number of the try, so that every one changes something.
ACTIONS = {
    "smoothing": "form.elements.smoothing.value = 0.5 + TRY / 20; form.dispatchEvent(new Event('input'))",
    "axis": "form.elements.axis.value = ['elapsed', 'clock', 'step', 'elapsed', 'step'][TRY + 1];"
    "form.dispatchEvent(new Event('input'))",
    "zoom in": "showSteps('run0', [1000 + TRY, 2000 + TRY])",
    "zoom out": "showSteps('run0', null)",
    "another layer": "picker('run0').value = 17 + TRY; pick('run0')",
    "point at a chart": "Plotly.Fx.hover(document.querySelector('.plot.steps'), {xval: 1000 + 900 * TRY})",
    "point at layers": "(() => {"
    "const map = document.querySelector('.plot.heat canvas').getBoundingClientRect();"
    "document.querySelector('.plot.heat').dispatchEvent(new PointerEvent('pointermove', "
    "{clientX: map.left + 200 + 90 * TRY, clientY: map.top + 9 + 90 * TRY})) })()",
    "layers, anew": "showLayers('run0')",
    "open a table": "document.querySelectorAll('details.numbers')[TRY].open = true",
    "theme": "button.click()",
    "scroll": "scrollTo(0, TRY * 700)",
    "new rows": None,
}


def measured(browser: Browser, script: str) -> tuple[float, float]:
    """The longest task that an action brings: milliseconds on the wall, and of the processor."""
    category = "disabled-by-default-devtools.timeline"
    browser.traced.clear()
    browser.call("Tracing.start", traceConfig={"includedCategories": [category]})
    browser.run(script)
    browser.settle()
    time.sleep(0.2)
    browser.call("Tracing.end")
    browser.wait_for("Tracing.tracingComplete")
    threads = {(each["pid"], each["tid"]) for each in browser.traced if each["name"] == "EvaluateScript"}
    tasks = [
        each
        for each in browser.traced
        if each["name"] == "RunTask" and "tdur" in each and (each["pid"], each["tid"]) in threads
    ]
    return max(event["dur"] for event in tasks) / 1e3, max(event["tdur"] for event in tasks) / 1e3


def main(steps: int = 5000, layers: int = 300, every: int = 5) -> int:
    """Print a line an action; 1 where one takes longer than the limit on the processor."""
    program = find()
    if program is None:
        print("no Chromium here")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder) / "run", steps, layers, every)
        file = run / "metrics.jsonl"
        lines = [_clipped(line) for line in file.read_text().splitlines()]
        file.write_text("".join(lines[: -10 * TIMES]))
        with Server(Answers(follow([run])), "127.0.0.1", 0) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            browser = Browser(program, Path(folder) / "profile", patience=1800.0)
            try:
                return _all(browser, server.url, file, lines)
            finally:
                browser.close()
                server.shutdown()


def _clipped(line: str) -> str:
    """The row with a threshold that lies below most norms."""
    row = json.loads(line)
    norm = float(row["grad_norm"] or "nan")
    row |= {"threshold": 0.3, "clipped": norm > 0.3, "clip_coef": 0.3 / norm if norm > 0.3 else 1.0}
    return json.dumps(row) + "\n"


def _all(browser: Browser, url: str, file: Path, lines: list[str]) -> int:
    browser.open(url)
    browser.run("form.elements.follow.checked = false")
    browser.run("document.querySelector('[data-layers]').click()")
    while not browser.run("document.querySelectorAll('.plot.heat canvas').length"):
        time.sleep(0.1)
    browser.settle()
    worst = 0.0
    print(f"{'action':<16}{'wall ms':>10}{'largest':>10}{'cpu ms':>10}{'largest':>10}")
    for name, script in ACTIONS.items():
        found = []
        for place in range(TIMES):
            if script is None:
                start = len(lines) - 10 * (TIMES - place)
                with file.open("a") as out:
                    out.writelines(lines[start : start + 10])
            found.append(measured(browser, "poll()" if script is None else script.replace("TRY", str(place))))
        wall, cpu = zip(*found, strict=True)
        print(
            f"{name:<16}{statistics.median(wall):>10.0f}{max(wall):>10.0f}"
            f"{statistics.median(cpu):>10.0f}{max(cpu):>10.0f}",
            flush=True,
        )
        worst = max(worst, statistics.median(cpu))
    assert browser.complaints == [], browser.complaints
    print(f"longest median on the processor: {worst:.0f} ms; the limit is {LIMIT:.0f} ms")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
