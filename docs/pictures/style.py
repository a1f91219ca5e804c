"""One look for all pictures, and numbers that are written the same way everywhere."""

from __future__ import annotations

import math
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, PAPER = "#1b1f24", "#fefefe"  # docs/theme/hooks.py makes the page's own colours of these two
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#3b7dd8", "#e08a1e", "#2fa36b", "#d0493f", "#8e68c4", "#868e99"
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, GREY)

SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica", "sans-serif"],
    "font.size": 9.5,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "axes.prop_cycle": matplotlib.cycler(color=CYCLE),
    "figure.constrained_layout.use": True,
}


def panels(
    rows: int = 1, columns: int = 1, width: float = 7.2, height: float = 3.0, **more: Any
) -> tuple[Figure, Any]:
    """A figure of the guide's width, and its axes."""
    return plt.subplots(rows, columns, figsize=(width, height), **more)


def label(axes: Axes, title: str = "", x: str = "", y: str = "", legend: bool = False, **scales: Any) -> None:
    """Say what an axes shows; `scales` are passed to `set`, such as yscale="log"."""
    axes.set(title=title, xlabel=x, ylabel=y, **scales)
    if legend:
        axes.legend()


def rounded(value: Any, digits: int = 5) -> Any:
    """The same data with floats of so many significant digits; what isn't finite becomes None."""
    if isinstance(value, dict):
        return {str(key): rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry, digits) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value
