"""What a norm is: arrows, unit balls, and a matrix that stretches a circle."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from docs.pictures.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, label, panels

MATRIX = ((2.0, 1.0), (0.5, 1.5))


def arrows(_: dict) -> Figure:
    """A bowl from above, with its gradient at some places."""
    figure, axes = panels(height=3.6)
    x, y = np.meshgrid(np.linspace(-3, 3, 121), np.linspace(-2, 2, 81))
    axes.contour(
        x, y, 0.5 * x**2 + 1.5 * y**2, levels=np.array([0.25, 1, 2.25, 4, 6.25, 9]), colors=GREY, alpha=0.7
    )
    for a, b in ((2.4, 0.3), (1.2, -0.9), (-0.6, 0.45), (-2.0, -1.2), (-2.4, 1.0), (0.3, 1.4)):
        g = np.array([a, 3 * b])
        axes.annotate(
            "",
            (a - 0.3 * g[0], b - 0.3 * g[1]),
            (a, b),
            arrowprops={"arrowstyle": "-|>", "color": BLUE, "lw": 1.8},
        )
        axes.plot(a, b, "o", color=BLUE, ms=4)
        axes.annotate(
            f"‖g‖ = {np.linalg.norm(g):.1f}",
            (a, b),
            xytext=(6, 5 if b > 0 else -12),
            textcoords="offset points",
        )
    axes.plot(0, 0, "*", color=ORANGE, ms=12)
    label(axes, x="first weight", y="second weight", aspect="equal")
    axes.grid(False)
    return figure


def unit_balls(_: dict) -> Figure:
    """All vectors of norm 1 for p = 1, 2 and inf, and (3, -4) measured by each."""
    figure, axes = panels(1, 2, height=3.2, gridspec_kw={"width_ratios": [1, 1.2]})
    angle = np.linspace(0, 2 * math.pi, 400)
    points = np.stack([np.cos(angle), np.sin(angle)])
    for p, color, name in ((1, GREEN, "p = 1"), (2, BLUE, "p = 2"), (math.inf, ORANGE, "p = inf")):
        axes[0].plot(*(points / np.linalg.norm(points, p, axis=0)), color=color, label=name)
    axes[0].legend(loc="center")
    label(axes[0], "all vectors whose norm is 1", "first entry", "second entry", aspect="equal")
    orders = np.linspace(1, 12, 200)
    axes[1].plot(orders, [np.linalg.norm([3, -4], p) for p in orders], color=PURPLE)
    for p, color in ((1, GREEN), (2, BLUE)):
        axes[1].plot(p, np.linalg.norm([3, -4], p), "o", color=color)
    axes[1].axhline(4, color=ORANGE, ls="--", lw=1.2)
    axes[1].text(12, 3.92, "p = inf: the largest entry, 4", ha="right", va="top")
    label(axes[1], "the norm of (3, -4)", "order p", "norm", ylim=(3.5, 7.2))
    return figure


def matrix_norms(_: dict) -> Figure:
    """The unit circle, and what a matrix makes of it."""
    matrix = np.array(MATRIX)
    u, s, _ = np.linalg.svd(matrix)
    figure, axes = panels(1, 2, height=3.3)
    angle = np.linspace(0, 2 * math.pi, 300)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    axes[0].plot(*circle, color=GREY, label="unit circle")
    axes[0].plot(*(matrix @ circle), color=BLUE, label="its image under G")
    for i, color in ((0, RED), (1, GREEN)):
        end = u[:, i] * s[i] * (-1 if u[0, i] < 0 and i == 0 else 1)
        axes[0].annotate("", end, (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2})
        axes[0].annotate(
            f"σ = {s[i]:.2f}",
            end,
            xytext=(5, 5) if i == 0 else (-40, 8),
            textcoords="offset points",
            color=color,
        )
    axes[0].legend(loc="lower right")
    label(axes[0], "a matrix stretches a circle", aspect="equal", xlim=(-3.2, 3.2), ylim=(-2.4, 2.4))
    names = ["spectral\nlargest σ", "Frobenius\n√(sum of σ²)", "nuclear\nsum of σ"]
    values = [s[0], math.hypot(*s), s.sum()]
    bars = axes[1].bar(names, values, color=[RED, BLUE, PURPLE], width=0.6)
    axes[1].bar_label(bars, [f"{value:.2f}" for value in values], padding=2, color=INK)
    axes[1].grid(False, axis="x")
    label(axes[1], "three norms of the same matrix", ylim=(0, 4.6))
    return figure


PICTURES = {"arrows": arrows, "unit_balls": unit_balls, "matrix_norms": matrix_norms}
