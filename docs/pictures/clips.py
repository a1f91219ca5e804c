"""What clipping does: to a vector, at a cliff, inside four optimizers, and to a real gradient."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from docs.pictures import small
from docs.pictures.signals import Recurrent, recall
from docs.pictures.style import BLUE, GREEN, GREY, ORANGE, RED, label, panels, rounded


def geometry(_: dict) -> Figure:
    figure, axes = panels(1, 2, height=3.5, sharey=True)
    angles = np.radians([12, 35, 60, 85, 118, 150, 200, 245, 290, 330])
    lengths = np.array([2.6, 2.0, 2.7, 1.6, 2.4, 0.7, 2.2, 2.5, 0.8, 2.3])
    ends = np.stack([lengths * np.cos(angles), lengths * np.sin(angles)], 1)
    by_norm = ends * np.minimum(1, 1 / lengths)[:, None]
    by_value = np.clip(ends, -0.8, 0.8)
    for ax, after, color in ((axes[0], by_norm, BLUE), (axes[1], by_value, ORANGE)):
        for old, new in zip(ends, after, strict=True):
            ax.annotate(
                "", old, (0, 0), arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1, "alpha": 0.6}
            )
            ax.annotate("", new, (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2})
        ax.set(xlim=(-2.9, 2.9), ylim=(-2.7, 2.9))
    circle = np.linspace(0, 2 * math.pi, 200)
    axes[0].plot(np.cos(circle), np.sin(circle), color=BLUE, ls="--", lw=1)
    axes[1].plot([-0.8, 0.8, 0.8, -0.8, -0.8], [-0.8, -0.8, 0.8, 0.8, -0.8], color=ORANGE, ls="--", lw=1)
    label(axes[0], "by norm: into a ball, same direction", "first entry", "second entry", aspect="equal")
    label(axes[1], "by value: into a box", "first entry", aspect="equal")
    return figure


def one_unit(w: Tensor, b: Tensor, steps: int = 50) -> Tensor:
    """The loss of a recurrence of one unit: a state of 0.5, 50 times through sigmoid(w x + b), should become 0.7."""
    x = torch.full_like(w, 0.5)
    for _ in range(steps):
        x = torch.sigmoid(w * x + b)
    return (x - 0.7) ** 2


def cliff() -> dict[str, Any]:
    """The loss over (w, b), and where gradient descent goes from one place with and without clipping."""
    w, b = torch.meshgrid(torch.linspace(3.2, 7.4, 61), torch.linspace(-3.0, 3.6, 61), indexing="xy")
    surface = one_unit(w.double(), b.double())
    result: dict[str, Any] = {"loss": rounded(surface.tolist(), 3)}
    for name, limit in (("plain", math.inf), ("clipped", 0.2)):
        place = torch.tensor([5.5, -2.5], dtype=torch.float64, requires_grad=True)
        path, norms, losses = [], [], []
        for _ in range(80):
            loss = one_unit(place[0], place[1])
            (g,) = torch.autograd.grad(loss, place)
            norm = float(g.norm())
            path.append(place.tolist())
            norms.append(norm)
            losses.append(loss.item())
            place = (place - g * min(1.0, limit / max(norm, 1e-12))).detach().requires_grad_()
        jumps = [math.dist(p, q) for p, q in itertools.pairwise(path)]
        result[name] = {
            "path": path,
            "norm": norms,
            "largest": max(norms),
            "jump": max(jumps),
            "last": losses[-1],
        }
    return result


def cliff_picture(data: dict) -> Figure:
    run = data["cliff"]
    figure, axes = panels(height=3.6)
    w, b = np.linspace(3.2, 7.4, 61), np.linspace(-3.0, 3.6, 61)
    mesh = axes.contourf(w, b, np.array(run["loss"]), levels=14, cmap="Greys", alpha=0.55)
    figure.colorbar(mesh, ax=axes, label="loss")
    for name, color in (("plain", RED), ("clipped", BLUE)):
        x, y = zip(*run[name]["path"], strict=True)
        axes.plot(x, y, "o-", ms=3, lw=1.2, color=color, label=name, clip_on=True)
    axes.plot(*run["plain"]["path"][0], "*", color=ORANGE, ms=12, zorder=5)
    axes.grid(False)
    label(axes, "", "w", "b", legend=True, xlim=(3.2, 7.4), ylim=(-3.0, 3.6))
    return figure


def newton_schulz(g: Tensor, rounds: int = 5) -> Tensor:
    """A matrix with the singular vectors of g and singular values near 1, by Muon's quintic iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g.norm() + 1e-7)
    for _ in range(rounds):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x


def optimizer_updates(name: str, stream: list[Tensor]) -> list[Tensor]:
    """The updates (with a learning rate of 1) that an optimizer makes of a stream of gradients."""
    m, v, updates = torch.zeros_like(stream[0]), torch.zeros_like(stream[0]), []
    for t, g in enumerate(stream, 1):
        if name == "SGD":
            update = g
        elif name == "momentum":
            m = 0.9 * m + g
            update = m
        elif name == "Adam":
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            update = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        else:
            m = 0.95 * m + g
            update = newton_schulz(g + 0.95 * m)
        updates.append(update)
    return updates


SPIKE = 100


def optimizers() -> dict[str, Any]:
    """A stream of gradients, one of which is 1,000 times as long and points elsewhere: update norms of four optimizers."""
    draw = small.generator(21)
    mean = 0.3 * torch.randn(32, 32, generator=draw)
    stream = [mean + torch.randn(32, 32, generator=draw) for _ in range(400)]
    usual = float(torch.stack([g.norm() for g in stream]).median())
    spiked = list(stream)
    other = torch.randn(32, 32, generator=draw)
    spiked[SPIKE] = 1000 * usual * other / other.norm()
    clipped = [g * min(1.0, 1.5 * usual / float(g.norm())) for g in spiked]
    result: dict[str, Any] = {}
    for name in ("SGD", "momentum", "Adam", "Muon"):
        calm = optimizer_updates(name, stream)
        entry: dict[str, Any] = {}
        for kind, gradients in (("plain", spiked), ("clipped", clipped)):
            pairs = list(zip(optimizer_updates(name, gradients), calm, strict=True))
            ratio = [float(a.norm() / b.norm()) for a, b in pairs]
            cosine = [float(torch.cosine_similarity(a.flatten(), b.flatten(), 0)) for a, b in pairs]
            after = ratio[SPIKE:]
            entry[kind] = {
                "ratio": ratio[SPIKE - 20 :],
                "largest": max(after),
                "smallest": min(after),
                "unlike": sum(not 0.9 < r < 1.1 for r in after),
                "late": ratio[SPIKE + 200],
                "cosine": cosine[SPIKE - 20 :],
                "astray": sum(c < 0.5 for c in cosine[SPIKE:]),
            }
        result[name] = entry
    return result


def optimizers_picture(data: dict) -> Figure:
    figure, axes = panels(2, 4, height=4.0, width=8.4, sharex=True, sharey="row")
    for column, (name, run) in zip(axes.T, data["optimizers"].items(), strict=True):
        for kind, color in (("plain", RED), ("clipped", BLUE)):
            for ax, what in zip(column, ("ratio", "cosine"), strict=True):
                ax.plot(
                    range(-20, len(run[kind][what]) - 20), run[kind][what], color=color, label=kind, lw=1.3
                )
        column[0].set(title=name, yscale="log", ylim=(0.03, 2000))
        column[1].set(xlabel="steps after the spike", ylim=(-0.1, 1.1))
    axes[0, 0].set_ylabel("length / usual length")
    axes[1, 0].set_ylabel("cosine with usual update")
    axes[0, 0].legend()
    return figure


def smoothness() -> dict[str, Any]:
    """Along a recurrent network's training: the gradient's norm, and ‖H g‖ / ‖g‖, how fast the gradient changes along itself."""
    model, draw = Recurrent(1.25).double(), small.generator(22)
    x, y = recall(128, 25, draw)
    x, parameters = x.double(), list(model.parameters())

    def gradient() -> Tensor:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])

    norms, curvatures = [], []
    for _ in range(200):
        place, g = torch.nn.utils.parameters_to_vector(parameters).detach(), gradient()
        unit = g / g.norm()
        torch.nn.utils.vector_to_parameters(place + 1e-5 * unit, parameters)
        norms.append(float(g.norm()))
        curvatures.append(float((gradient() - g).norm()) / 1e-5)
        torch.nn.utils.vector_to_parameters(place - 0.05 * unit * min(1.0, norms[-1]), parameters)
    u, v = np.log(norms), np.log(curvatures)
    return {
        "norm": norms,
        "smoothness": curvatures,
        "correlation": float(np.corrcoef(u, v)[0, 1]),
        "slope": float(np.polyfit(u, v, 1)[0]),
        "norm_range": max(norms) / min(norms),
        "smoothness_range": max(curvatures) / min(curvatures),
    }


def smoothness_picture(data: dict) -> Figure:
    run = data["smoothness"]
    figure, axes = panels(height=3.2)
    dots = axes.scatter(run["norm"], run["smoothness"], c=range(len(run["norm"])), cmap="viridis", s=14)
    figure.colorbar(dots, ax=axes, label="training step")
    label(axes, "", "norm of the gradient", "local smoothness ‖H g‖ / ‖g‖", xscale="log", yscale="log")
    return figure


def directions() -> dict[str, Any]:
    """One gradient of a small transformer, clipped in three ways ever harder: what is left of length and direction."""
    model, data = small.Transformer(), small.batches(16)
    small.train(model, data, 150, torch.optim.AdamW(model.parameters(), lr=6e-3))
    model.zero_grad()
    model(next(data)).backward()
    grads = [p.grad.double() for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    result: dict[str, Any] = {}
    for way in ("global", "per tensor", "by value"):
        kept, cosine = [], []
        top = {
            "global": flat.norm(),
            "per tensor": max(g.norm() for g in grads),
            "by value": flat.abs().max(),
        }[way]
        for limit in torch.logspace(0, -3, 40, dtype=torch.float64) * top:
            if way == "by value":
                new = flat.clamp(-limit, limit)
            elif way == "global":
                new = flat * min(1.0, float(limit / flat.norm()))
            else:
                new = torch.cat([(g * min(1.0, float(limit / g.norm()))).flatten() for g in grads])
            kept.append(float(new.norm() / flat.norm()))
            cosine.append(float(torch.cosine_similarity(new, flat, dim=0)))
        result[way] = {
            "kept": kept,
            "cosine": cosine,
            "at_tenth": float(np.interp(-0.1, [-k for k in kept], cosine)),
        }
    return result


def directions_picture(data: dict) -> Figure:
    figure, axes = panels(height=2.9)
    for (way, run), color in zip(data["directions"].items(), (BLUE, GREEN, ORANGE), strict=True):
        axes.plot(run["kept"], run["cosine"], color=color, label=way)
    axes.invert_xaxis()
    label(
        axes,
        "",
        "share of the norm that is kept (clipped harder to the right)",
        "cosine with the old gradient",
        legend=True,
        xscale="log",
        ylim=(0, 1.05),
    )
    return figure


RUNS = {"cliff": cliff, "optimizers": optimizers, "smoothness": smoothness, "directions": directions}
PICTURES = {
    "clip_geometry": geometry,
    "cliff": cliff_picture,
    "clip_optimizers": optimizers_picture,
    "smoothness": smoothness_picture,
    "clip_directions": directions_picture,
}
