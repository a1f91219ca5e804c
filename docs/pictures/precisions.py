"""Ranges of formats, errors of sums, and what a loss scale keeps of a real gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from docs.pictures import small
from docs.pictures.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, label, panels

FORMATS = {
    "fp64": (torch.float64, GREY),
    "fp32": (torch.float32, PURPLE),
    "bf16": (torch.bfloat16, GREEN),
    "fp16": (torch.float16, BLUE),
    "fp8 E5M2": (torch.float8_e5m2, ORANGE),
    "fp8 E4M3": (torch.float8_e4m3fn, RED),
}


def smallest(dtype: torch.dtype) -> float:
    """The smallest positive number of a format, a subnormal one."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


def formats(_: dict) -> Figure:
    figure, axes = panels(height=2.7)
    for row, (name, (dtype, color)) in enumerate(reversed(FORMATS.items())):
        low, high = math.log10(smallest(dtype)), math.log10(torch.finfo(dtype).max)
        axes.barh(
            row,
            max(-46, min(46, high)) - max(-46, low),
            left=max(-46, low),
            color=color,
            height=0.34,
            alpha=0.35,
        )
        axes.barh(row, (min(92, high) - max(-92, low)) / 2, left=max(-92, low) / 2, color=color, height=0.62)
        axes.text(-48, row, name, ha="right", va="center", color=INK)
    axes.set_yticks([])
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlim(-47, 47)
    label(axes, "", "power of ten (pale: the numbers of a format; solid: numbers whose squares fit into it)")
    return figure


def sums() -> dict[str, Any]:
    """Relative errors of norms of n elements of 0.1, by the way of adding up their squares."""
    counts = [10**k for k in range(2, 8)]
    result: dict[str, Any] = {"n": counts}

    def errors(norm: Any) -> list[float]:
        return [abs(float(norm(n)) / (0.1 * math.sqrt(n)) - 1) for n in counts]

    with np.errstate(over="ignore"):
        half = np.cumsum(np.full(10**7, np.float16(0.1)) ** 2, dtype=np.float16)
    single = np.cumsum(np.full(10**7, np.float32(0.1)) ** 2, dtype=np.float32)
    result["fp16, one by one"] = errors(lambda n: math.sqrt(half[n - 1]))
    result["fp32, one by one"] = errors(lambda n: math.sqrt(single[n - 1]))
    tenth = np.float32(0.1)
    result["fp32, pairwise"] = errors(lambda n: math.sqrt(np.sum(np.full(n, tenth) ** 2)))
    result["fp64, one by one"] = errors(lambda n: math.sqrt(np.cumsum(np.full(n, 0.1) ** 2)[-1]))
    return {
        **result,
        "stall": float(half[-1]),
        "half_end": result["fp16, one by one"][-1],
        "single_end": result["fp32, one by one"][-1],
        "pair_end": result["fp32, pairwise"][-1],
        "double_end": result["fp64, one by one"][-1],
    }


def sums_picture(data: dict) -> Figure:
    run = data["sums"]
    figure, axes = panels(height=2.9)
    for name, color in (
        ("fp16, one by one", BLUE),
        ("fp32, one by one", PURPLE),
        ("fp32, pairwise", GREEN),
        ("fp64, one by one", GREY),
    ):
        axes.plot(run["n"], [max(error, 1e-16) for error in run[name]], "o-", color=color, label=name)
    axes.axhline(2**-24, color=INK, ls=":", lw=1)
    axes.text(1.4e3, 2**-24 / 3, "half a unit in the last place of fp32", fontsize=8, va="top")
    label(axes, "", "elements of 0.1", "relative error of the norm", xscale="log", yscale="log")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def scales() -> dict[str, Any]:
    """For the gradient of a trained transformer: its magnitudes, and what is lost at each loss scale in three formats."""
    model, data = small.Transformer(), small.batches(16)
    small.train(model, data, 200, torch.optim.AdamW(model.parameters(), lr=6e-3))
    model.zero_grad()
    model(next(data)).backward()
    g = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    g = (
        g[g != 0] * 1e-3
    )  # as in a model with a thousand times as many parameters' worth of tokens in its mean
    powers = list(range(-4, 33))
    result: dict[str, Any] = {"power": powers, "elements": g.numel()}
    result["histogram"] = torch.histc(g.abs().log2(), bins=40, min=-40, max=0).tolist()
    for name in ("fp16", "fp8 E5M2", "fp8 E4M3"):
        lost, error, over = [], [], []
        for power in powers:
            scaled = g * 2.0**power
            top = torch.finfo(FORMATS[name][0]).max
            stored = scaled.to(FORMATS[name][0]).float()
            stored = torch.where(scaled.abs() > top, torch.full_like(stored, math.inf), stored)
            lost.append(float((stored == 0).double().mean()))
            over.append(bool(torch.isinf(stored).any()))
            error.append(float(stored.double().norm() / scaled.double().norm() - 1))
        usable = [p for p, x, o in zip(powers, lost, over, strict=True) if x < 0.01 and not o]
        result[name] = {
            "lost": lost,
            "over": over,
            "error": error,
            "first": usable[0] if usable else None,
            "last": usable[-1] if usable else None,
            "lost_unscaled": lost[powers.index(0)],
            "least_lost": min(x for x, o in zip(lost, over, strict=True) if not o),
        }
    return result


def scales_picture(data: dict) -> Figure:
    run = data["scales"]
    figure, axes = panels(1, 2, height=2.9)
    axes[0].bar(range(-40, 0), run["histogram"], width=0.9, color=BLUE)
    axes[0].axvline(-24, color=RED, lw=1.3, ls="--")
    axes[0].text(-24.5, max(run["histogram"]) * 0.9, "lost in fp16", ha="right", color=RED, fontsize=8.5)
    for name in ("fp16", "fp8 E5M2", "fp8 E4M3"):
        entry, color = run[name], FORMATS[name][1]
        good = [
            (p, 100 * x) for p, x, o in zip(run["power"], entry["lost"], entry["over"], strict=True) if not o
        ]
        axes[1].plot(*zip(*good, strict=True), color=color, label=name)
        axes[1].plot(*good[-1], "x", color=color, ms=8, mew=2)
    label(axes[0], "elements of a gradient", "log2 of the magnitude", "elements")
    label(
        axes[1],
        "after a loss scale (×: beyond it, inf)",
        "log2 of the loss scale",
        "% of the elements that become 0",
        legend=True,
    )
    return figure


RUNS = {"sums": sums, "scales": scales}
PICTURES = {"formats": formats, "sum_errors": sums_picture, "loss_scales": scales_picture}
