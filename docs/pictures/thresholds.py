"""Choosing a threshold: percentiles, a sweep on data with bad batches, and a threshold that time overtakes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from docs.pictures import small
from docs.pictures.style import BLUE, GREEN, GREY, ORANGE, RED, label, panels

CHANCE, STEPS = 0.06, 220
THRESHOLDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, None)


def dirty(seed: int) -> Iterator[Tensor]:
    """Batches of which 6 % repeat one symbol each."""
    draw = small.generator(seed)
    for batch in small.batches(16, seed=seed):
        bad = float(torch.rand((), generator=draw)) < CHANCE
        yield torch.randint(small.SYMBOLS, (1, 1), generator=draw).expand_as(batch).clone() if bad else batch


def held_out(model: torch.nn.Module) -> float:
    stream = small.batches(128, seed=77)
    with torch.no_grad():
        return sum(float(model(next(stream))) for _ in range(4)) / 4


def sweep() -> dict[str, Any]:
    """Held-out losses after training on dirty data under several thresholds, by SGD and by AdamW."""
    result: dict[str, Any] = {"threshold": list(THRESHOLDS)}
    for name in ("SGD", "AdamW"):
        losses, rates = [], []
        for limit in THRESHOLDS:
            model = small.Transformer()
            optimizer = (
                torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
                if name == "SGD"
                else torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
            )
            peak = 0.3 if name == "SGD" else 1e-2
            trace = small.train(
                model, dirty(31), STEPS, optimizer, small.warmup_cosine(peak, STEPS, 20), limit
            )
            losses.append(held_out(model))
            rates.append(0.0 if limit is None else sum(norm > limit for norm in trace.norm) / STEPS)
            if name == "SGD" and limit == 1.0:
                result["norms"] = trace.norm
        result[name] = {
            "loss": losses,
            "rate": rates,
            "best": min(losses),
            "none": losses[-1],
            "tight": losses[0],
            "best_threshold": THRESHOLDS[int(np.nanargmin(losses))],
        }
    return result


def sweep_picture(data: dict) -> Figure:
    run = data["sweep"]
    figure, axes = panels(1, 2, height=2.9)
    names = [str(limit) if limit else "none" for limit in run["threshold"]]
    for name, color in (("SGD", ORANGE), ("AdamW", BLUE)):
        axes[0].plot(
            names, [min(loss, 5) if loss else 5 for loss in run[name]["loss"]], "o-", color=color, label=name
        )
        axes[1].plot(names, [100 * rate for rate in run[name]["rate"]], "o-", color=color)
    label(axes[0], "held-out loss", "threshold", "cross-entropy", legend=True)
    label(axes[1], "steps that were clipped (%)", "threshold", ylim=(0, 104))
    return figure


def rates() -> dict[str, Any]:
    """The norms of 600 steps on dirty data, measured only: their percentiles and a threshold from them."""
    model = small.Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.95))
    norms = small.train(model, dirty(32), 600, optimizer, max_norm=2.0).norm[50:]
    points = {str(p): float(np.percentile(norms, p)) for p in (50, 90, 95, 99)}
    return {
        "norm": norms,
        "percentile": points,
        "mean": float(np.mean(norms)),
        "deviation": float(np.std(norms)),
        "recipe": 2 * points["50"],
        "recipe_rate": float(np.mean(np.array(norms) > 2 * points["50"])),
        "half_rate": float(np.mean(np.array(norms) > points["50"])),
        "largest": max(norms),
    }


def rates_picture(data: dict) -> Figure:
    run = data["rates"]
    figure, axes = panels(1, 2, height=2.9)
    norms = np.sort(run["norm"])
    axes[0].hist(norms, bins=np.geomspace(norms[0], norms[-1], 45), color=BLUE, alpha=0.8)
    axes[1].plot(norms, 100 * (1 - np.arange(1, len(norms) + 1) / len(norms)), color=BLUE)
    for ax in axes:
        for p, color in (("50", GREY), ("95", ORANGE)):
            ax.axvline(run["percentile"][p], color=color, ls="--", lw=1.2, label=f"{p}th percentile")
        ax.axvline(run["recipe"], color=GREEN, lw=1.4, label="twice the median")
    label(axes[0], "norms of 550 steps", "norm", "steps", xscale="log", yscale="log")
    label(axes[1], "what a threshold would clip", "threshold", "% of the steps", legend=True, xscale="log")
    return figure


def drift() -> dict[str, Any]:
    """A threshold from early steps, applied to all the steps of a run whose norm grows at its end."""
    from docs.pictures.make import load

    norms = np.array(load()["end"]["AdamW"]["raw"])
    early = norms[200:400]
    limit = float(np.percentile(early, 99))
    window = 100
    rate = [float(np.mean(norms[i : i + window] > limit)) for i in range(0, len(norms), window)]
    moving = [float(np.percentile(norms[max(0, i - 300) : i], 99)) for i in range(200, len(norms))]
    moved = norms[200:] > np.array(moving)
    return {
        "limit": limit,
        "rate": rate,
        "first": rate[3],
        "last": rate[-1],
        "moving_rate": float(moved.mean()),
        "moving_last": float(moved[-100:].mean()),
    }


def drift_picture(data: dict) -> Figure:
    run, norms = data["drift"], data["end"]["AdamW"]["raw"]
    figure, axes = panels(1, 2, height=2.7)
    axes[0].plot(norms, color=BLUE, lw=0.6)
    axes[0].axhline(run["limit"], color=RED, lw=1.4, label="99th percentile of steps 200 to 400")
    axes[0].axvspan(200, 400, color=GREEN, alpha=0.15, lw=0)
    axes[1].bar(range(50, 2000, 100), [100 * r for r in run["rate"]], width=80, color=RED)
    label(axes[0], "norm of the gradient", "step", legend=True, ylim=(0, 4.2))
    label(axes[1], "% of the steps above that threshold", "step", ylim=(0, 104))
    return figure


RUNS = {"sweep": sweep, "rates": rates, "drift": drift}
PICTURES = {
    "threshold_rates": rates_picture,
    "threshold_sweep": sweep_picture,
    "threshold_drift": drift_picture,
}
