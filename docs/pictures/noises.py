"""The gradient noise scale: measured directly, estimated from two batch sizes, and against steps to a loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from docs.pictures import small
from docs.pictures.style import BLUE, GREEN, ORANGE, label, panels


def flat(model: nn.Module, batch: Tensor) -> Tensor:
    model.zero_grad()
    model(batch).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


def direct(model: nn.Module, stream: Iterator[Tensor], parts: int = 48, size: int = 8) -> tuple[float, float]:
    """(squared norm of the true gradient, noise of one sequence), both without bias, from many small batches."""
    grads = torch.stack([flat(model, next(stream)) for _ in range(parts)])
    mean = grads.mean(0)
    noise = float((grads - mean).square().sum() / (parts - 1)) * size
    return float(mean.square().sum()) - noise / (parts * size), noise


def two_sizes(small_square: float, big_square: float, small_size: int, big_size: int) -> tuple[float, float]:
    """The same two numbers from squared norms at two batch sizes (McCandlish et al. 2018, appendix A)."""
    signal = (big_size * big_square - small_size * small_square) / (big_size - small_size)
    noise = (small_square - big_square) / (1 / small_size - 1 / big_size)
    return signal, noise


def noise_scale() -> dict[str, Any]:
    """Along a run whose batch of 32 is made of 4 ranks' 8 each: the estimate of each step, smoothed; and the truth, rarely."""
    model, stream = small.Transformer(), small.batches(8, seed=41)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    lr = small.warmup_cosine(8e-3, 400, 30)
    signals, noises, checks, losses = [], [], [], []
    for step in range(400):
        if step in (5, 25, 50, 100, 150, 200, 300, 399):
            signal, noise = direct(model, small.batches(8, seed=1000 + step))
            checks.append([step, noise / max(signal, 1e-12)])
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        grads = [flat(model, next(stream)) for _ in range(4)]
        mean = torch.stack(grads).mean(0)
        squares = sum(float(g.square().sum()) for g in grads) / 4
        signal, noise = two_sizes(squares, float(mean.square().sum()), 8, 32)
        signals.append(signal)
        noises.append(noise)
        place = 0
        for p in model.parameters():
            p.grad = mean[place : place + p.numel()].view_as(p).float()
            place += p.numel()
        optimizer.step()
        losses.append(squares)
    signal, noise = small.smooth(signals, 0.95), small.smooth(noises, 0.95)
    estimate = [b / a if a > 0 else float("nan") for a, b in zip(signal, noise, strict=True)]
    negative = sum(s <= 0 for s in signals)
    return {
        "estimate": estimate,
        "direct": checks,
        "first": checks[1][1],
        "last": checks[-1][1],
        "growth": checks[-1][1] / checks[1][1],
        "negative": negative,
        "negative_share": negative / 400,
    }


def noise_picture(data: dict) -> Figure:
    run = data["noise_scale"]
    figure, axes = panels(height=2.9)
    axes.plot(
        [x if x is not None else float("nan") for x in run["estimate"]],
        color=BLUE,
        label="estimate of each step, ratio of running means",
    )
    axes.plot(*zip(*run["direct"], strict=True), "o", color=ORANGE, label="measured with 384 sequences")
    label(axes, "", "step", "noise scale (sequences)", legend=True, yscale="log", ylim=(5, 3e4))
    return figure


def critical(target: float = 2.25) -> dict[str, Any]:
    """Steps and sequences until the smoothed loss is below 2.25, for several batch sizes, each at its best of two rates."""
    sizes, steps, best = [2, 4, 8, 16, 32, 64], [], []
    for size in sizes:
        counts = {}
        for rate in (4e-3, 8e-3):
            model, stream = small.Transformer(layers=1), small.batches(size, seed=42)
            optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.95))
            mean, weight, limit = 0.0, 0.0, min([600, *counts.values()])
            for step in range(1, limit + 1):
                optimizer.zero_grad()
                loss = model(next(stream))
                loss.backward()
                optimizer.step()
                mean, weight = 0.9 * mean + 0.1 * loss.item(), 0.9 * weight + 0.1
                if step > 10 and mean / weight < target:
                    counts[rate] = step
                    break
        rate = min(counts, key=lambda r: counts[r])
        steps.append(counts[rate])
        best.append(rate)
    # Least squares of S = S_min (1 + B_crit / B), linear in 1/B, with errors relative to S.
    rows = torch.tensor(
        [[1 / s, 1 / (b * s)] for b, s in zip(sizes, steps, strict=True)], dtype=torch.float64
    )
    least, product = (
        torch.linalg.lstsq(rows, torch.ones(len(sizes), 1, dtype=torch.float64)).solution[:, 0].tolist()
    )
    return {
        "size": sizes,
        "steps": steps,
        "rate": best,
        "sequences": [a * b for a, b in zip(sizes, steps, strict=True)],
        "least": least,
        "critical": product / least,
    }


def critical_picture(data: dict) -> Figure:
    run = data["critical"]
    figure, axes = panels(1, 2, height=2.8)
    line = [2 ** (i / 8) for i in range(8, 49)]
    for ax, measured, fitted in (
        (axes[0], run["steps"], [run["least"] * (1 + run["critical"] / b) for b in line]),
        (axes[1], run["sequences"], [run["least"] * (b + run["critical"]) for b in line]),
    ):
        ax.plot(run["size"], measured, "o", color=BLUE, label="measured")
        ax.plot(line, fitted, color=BLUE, lw=1.2, label="S_min (1 + B_crit / B)")
        ax.axvline(run["critical"], color=GREEN, ls="--", lw=1.2, label="B_crit")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
    label(axes[0], "steps to the loss", "batch size (sequences)", legend=True, yscale="log")
    label(axes[1], "sequences to the loss", "batch size (sequences)", yscale="log")
    return figure


RUNS = {"noise_scale": noise_scale, "critical": critical}
PICTURES = {"noise_scale": noise_picture, "critical_batch": critical_picture}
