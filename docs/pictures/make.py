"""Draw the guide's pictures from the recorded runs, or repeat the runs first: python -m docs.pictures.make [--runs] [NAME ...]

A module of this folder has RUNS, functions that return numbers, and PICTURES, functions that draw such numbers. A run's
numbers are kept in data/NAME.json, from which the pages quote too; pictures go to docs/img.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from docs.pictures.style import SETTINGS, rounded

DATA = Path(__file__).parent / "data"
IMAGES = Path(__file__).parent.parent / "img"
Data = dict[str, Any]


def collect(kind: str) -> dict[str, Any]:
    """All RUNS, or all PICTURES, of the modules beside this one."""
    found: dict[str, Any] = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if file.stem not in ("__init__", "make", "style"):
            found |= getattr(importlib.import_module(f"docs.pictures.{file.stem}"), kind, {})
    return found


def run(function: Callable[[], Data]) -> Data:
    """A run's numbers, as they would be read from its file."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        return json.loads(json.dumps(rounded(function())))
    finally:
        torch.set_num_threads(threads)


def load() -> Data:
    """All recorded numbers, by the run's name."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(DATA.glob("*.json"))}


def draw(name: str, function: Callable[[Data], Figure], data: Data, folder: Path = IMAGES) -> Path:
    """One picture, the same bytes each time."""
    with plt.rc_context({**SETTINGS, "svg.hashsalt": name}):
        figure = function(data)
        path = folder / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", action="store_true", help="repeat the runs")
    parser.add_argument("names", nargs="*", help="runs or pictures; all of them if none is named")
    arguments = parser.parse_args()
    wanted = set(arguments.names)
    if arguments.runs:
        for name, function in collect("RUNS").items():
            if not wanted or name in wanted:
                begin = time.perf_counter()
                text = json.dumps(run(function), separators=(",", ":"))
                (DATA / f"{name}.json").write_text(text + "\n", encoding="utf-8")
                print(f"{name}: {time.perf_counter() - begin:.1f} s, {len(text) / 1024:.0f} KiB", flush=True)
    data = load()
    for name, function in collect("PICTURES").items():
        if not wanted or name in wanted:
            draw(name, function, data)


if __name__ == "__main__":
    main()
