"""Who holds what under each kind of parallelism, and what the mistakes of the table in gradient-norm.md make of 15."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from docs.pictures.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, label, panels

DOCS = Path(__file__).parent.parent
COLORS = {"w": BLUE, "n": ORANGE, "e": PURPLE}
Rank = tuple[str, dict[str, str]]

# A letter for each of 4 rows: "#" held and final, "~" held and still a summand, "." elsewhere.
HOLDINGS: dict[str, list[Rank]] = {
    "hold_ddp": [(f"rank {r}", {"w": "####", "n": "####"}) for r in range(4)],
    "hold_fsdp": [
        (f"rank {r}", {"w": "." * r + "#" + "." * (3 - r), "n": "." * r + "#" + "." * (3 - r)})
        for r in range(4)
    ],
    "hold_hsdp": [
        (
            f"rank {r}\nreplica {r // 2}, shard {r % 2}",
            {"w": "##.." if r % 2 == 0 else "..##", "n": "##.." if r % 2 == 0 else "..##"},
        )
        for r in range(4)
    ],
    "hold_tp": [
        ("TP\nrank 0", {"w": "##..", "n": "####"}),
        ("TP\nrank 1", {"w": "..##", "n": "####"}),
        ("TP + SP\nrank 0", {"w": "##..", "n": "~~~~"}),
        ("TP + SP\nrank 1", {"w": "..##", "n": "~~~~"}),
    ],
    "hold_pp": [
        ("stage 0", {"w": "####", "n": "...."}),
        ("stage 1", {"w": "....", "n": "####"}),
        ("stage 0\nw tied", {"w": "####", "n": "...."}),
        ("stage 1\nw tied", {"w": "####", "n": "####"}),
    ],
    "hold_ep": [
        (
            f"rank {r}\nep {r % 2}, replica {r // 2}",
            {"e": "##.." if r % 2 == 0 else "..##", "n": "." * r + "#" + "." * (3 - r)},
        )
        for r in range(4)
    ],
    "hold_cp": [
        ("before\nrank 0", {"w": "~~~~", "n": "~~~~"}),
        ("before\nrank 1", {"w": "~~~~", "n": "~~~~"}),
        ("after\nrank 0", {"w": "####", "n": "####"}),
        ("after\nrank 1", {"w": "####", "n": "####"}),
    ],
}


def hold(name: str, _: dict) -> Figure:
    """One box a rank; in it the rows of each parameter, filled where the rank holds them."""
    ranks = HOLDINGS[name]
    figure, axes = panels(height=2.3)
    for x, (title, holding) in enumerate(ranks):
        axes.add_patch(
            FancyBboxPatch(
                (x + 0.06, 0.0),
                0.88,
                1.0,
                boxstyle="round,pad=0,rounding_size=0.04",
                fc="none",
                ec=GREY,
                lw=1,
            )
        )
        axes.text(x + 0.5, 1.04, title, ha="center", va="bottom", color=INK, fontsize=9)
        for column, (parameter, rows) in enumerate(holding.items()):
            left = x + 0.15 + 0.38 * column
            world = (
                ranks
                if len({t.split("\n")[0][:6] for t, _ in ranks}) == 4
                else ranks[x // 2 * 2 : x // 2 * 2 + 2]
            )
            copies = sum(other[parameter] == rows for _, other in world)
            for i, state in enumerate(rows):
                _row(axes, left, 0.88 - 0.18 * i, COLORS[parameter], state)
            text = "" if set(rows) == {"."} else ("a summand" if "~" in rows else f"R = {copies}")
            axes.text(
                left + 0.16, 0.175, parameter, ha="center", va="center", color=INK, fontsize=9, style="italic"
            )
            axes.text(left + 0.16, 0.065, text, ha="center", va="center", color=INK, fontsize=7.5)
    axes.set(xlim=(0, len(ranks)), ylim=(-0.02, 1.28))
    axes.axis("off")
    return figure


def _row(axes: Axes, x: float, y: float, color: str, state: str) -> None:
    hatch, alpha = {"#": (None, 0.85), "~": ("////", 0.3), ".": (None, 0.0)}[state]
    if state != ".":
        axes.add_patch(Rectangle((x, y - 0.07), 0.32, 0.14, fc=color, ec="none", alpha=alpha))
    axes.add_patch(
        Rectangle(
            (x, y - 0.07),
            0.32,
            0.14,
            fc="none",
            ec=color if state != "." else GREY,
            lw=0.8,
            hatch=hatch,
            alpha=1.0 if state != "." else 0.5,
        )
    )


def worked() -> list[tuple[str, str, float]]:
    """Parallelism, mistake and ratio of each row of the table of worked mistakes."""
    text = (DOCS / "gradient-norm.md").read_text(encoding="utf-8")
    table = text.split("<!-- worked:", 1)[1].split("-->", 1)[1].strip().split("\n\n", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return [(row[0].split(",")[0], re.sub(r"`", "", row[1]), float(row[-1])) for row in rows]


def mistakes(_: dict) -> Figure:
    rows = worked()[::-1]
    figure, axes = panels(height=4.2, width=8.4)
    for y, (_kind, _mistake, ratio) in enumerate(rows):
        axes.barh(y, ratio - 1, left=1, color=RED if ratio > 1 else BLUE, height=0.6)
        axes.text(
            ratio + (0.04 if ratio > 1 else -0.04),
            y,
            f"{ratio:.2f}",
            va="center",
            ha="left" if ratio > 1 else "right",
            fontsize=8.5,
        )
    axes.set_yticks(range(len(rows)), [f"{kind}: {mistake}" for kind, mistake, _ in rows], fontsize=7.5)
    axes.axvline(1, color=INK, lw=1)
    axes.grid(False, axis="y")
    label(axes, "", "measured / true norm", xlim=(0.1, 4.5))
    return figure


CELLS = {
    "name": ("other layers: other names", GREY),
    "cut": ("cut: each rank holds another piece", BLUE),
    "same": ("replicas: count 1/R each", ORANGE),
    "sum": ("summands: reduce first", RED),
}
MESH = {
    "attention, MLP": ("name", "same", "cut", "cut", "cut"),
    "LayerNorm gain": ("name", "same", "cut", "cut", "sum"),
    "router": ("name", "same", "cut", "cut", "same"),
    "experts (own mesh)": ("name", "same", "cut", "cut", "cut"),
    "tied embedding": ("same", "same", "cut", "cut", "cut"),
}
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


def mesh(_: dict) -> Figure:
    """What each axis of a 5-D mesh does to each kind of parameter."""
    figure, axes = panels(height=2.9)
    for y, kinds in enumerate(MESH.values()):
        for x, kind in enumerate(kinds):
            axes.add_patch(
                Rectangle((x + 0.04, y + 0.08), 0.92, 0.84, fc=CELLS[kind][1], alpha=0.75, ec="none")
            )
            axes.text(
                x + 0.5,
                y + 0.5,
                {"name": "names", "cut": "cut", "same": "replicas", "sum": "summands"}[kind],
                ha="center",
                va="center",
                color=INK,
                fontsize=9,
            )
    axes.set(xlim=(0, 5), ylim=(len(MESH), 0))
    axes.set_xticks([x + 0.5 for x in range(5)], AXES)
    axes.set_yticks([y + 0.5 for y in range(len(MESH))], list(MESH))
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def wrong_today(_: dict) -> Figure:
    """What functions in use report for a true norm of 1, from the table of comparison.md."""
    text = (DOCS / "comparison.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heads = [cell.strip() for cell in lines[0].strip("|").split("|")]
    cells = []
    for line in lines[2:]:
        row = [cell.strip() for cell in line.strip("|").split("|")]
        for who, said in zip(heads[1:-1], row[1:-1], strict=True):
            match = re.match(r"x ([\d.]+)", said)
            if match and not 0.99 < float(match[1]) < 1.01:
                cells.append((f"{who}: {row[0]}", float(match[1])))
            elif said in ("hangs", "raises", "inf", "0", "-1"):
                cells.append((f"{who}: {row[0]}", said))
    numbers = sorted((c for c in cells if isinstance(c[1], float)), key=lambda c: c[1])
    words = [(word, sum(c[1] == word for c in cells)) for word in ("raises", "hangs", "inf", "0", "-1")]
    figure, axes = panels(1, 2, height=2.2, width=8.2, gridspec_kw={"width_ratios": [1.6, 1]})
    for y, (_who, ratio) in enumerate(numbers):
        axes[0].barh(
            y, ratio - 1 if ratio < 100 else 0.9, left=1, color=RED if ratio > 1 else BLUE, height=0.62
        )
        shown = f"{ratio:.2f}" if ratio < 100 else f"{ratio:,.0f} →"
        axes[0].text(
            min(ratio, 1.9) + (0.03 if ratio > 1 else -0.03),
            y,
            shown,
            va="center",
            ha="left" if ratio > 1 else "right",
            fontsize=8.5,
        )
    axes[0].set_yticks(range(len(numbers)), [who for who, _ in numbers], fontsize=8)
    axes[0].axvline(1, color=GREEN, lw=1.6)
    axes[0].grid(False, axis="y")
    label(axes[0], "", "reported / true norm", xlim=(0.4, 2.25))
    names = [f"reports {word}" if word in ("inf", "0", "-1") else word for word, _ in words]
    bars = axes[1].barh(
        names, [c for _, c in words], color=[ORANGE, RED, PURPLE, PURPLE, PURPLE], height=0.62
    )
    axes[1].bar_label(bars, padding=3, fontsize=8.5)
    axes[1].grid(False)
    axes[1].invert_yaxis()
    label(axes[1], "", "cells of 14 x 4", xlim=(0, max(c for _, c in words) * 1.2))
    return figure


PICTURES = {name: partial(hold, name) for name in HOLDINGS} | {
    "mistakes": mistakes,
    "mesh": mesh,
    "wrong_today": wrong_today,
}
