"""Vanishing and exploding gradients, and curves of healthy training."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from docs.pictures import small
from docs.pictures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, label, panels

STEPS_BACK = 60


class Recurrent(nn.Module):
    """h <- tanh(W h + U x); says at the end which of 4 symbols came first. W begins as `radius` times a rotation."""

    def __init__(self, radius: float, dim: int = 48) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.u, self.out = nn.Linear(4, dim, bias=False), nn.Linear(dim, 4)
        nn.init.normal_(self.u.weight, std=0.1)
        self.w = nn.Parameter(radius * torch.linalg.qr(torch.randn(dim, dim))[0].contiguous())
        self.states: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], self.w.shape[0])
        self.states = []
        for i in range(x.shape[1]):
            h = torch.tanh(h @ self.w.T + self.u(x[:, i]))
            if h.requires_grad:
                h.retain_grad()
            self.states.append(h)
        return self.out(h)


def recall(size: int, length: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Texts whose first symbol is the answer; the rest is faint noise."""
    x = 0.1 * torch.randn(size, length, 4, generator=draw)
    first = torch.randint(4, (size,), generator=draw)
    x[:, 0] += torch.nn.functional.one_hot(first, 4)
    return x, first


def rnn() -> dict[str, Any]:
    """For three radii: the gradient's norm at each state before training, and losses and norms of training by SGD."""
    return remember("SGD", (0.8, 1.0, 1.4))


def rnn_adam() -> dict[str, Any]:
    """The smallest radius again, by Adam."""
    return remember("Adam", (0.8,))


def remember(name: str, radii: tuple[float, ...]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for radius in radii:
        model, draw = Recurrent(radius), small.generator(4)
        adam = torch.optim.Adam(model.parameters(), lr=2e-3)
        optimizer = adam if name == "Adam" else torch.optim.SGD(model.parameters(), lr=0.1)
        back, losses, norms = [], [], []
        for step in range(200 if name == "SGD" else 300):
            x, first = recall(32, STEPS_BACK, draw)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), first)
            loss.backward()
            if step == 0:
                back = [float(h.grad.norm()) for h in reversed(model.states) if h.grad is not None]
            losses.append(loss.item())
            norms.append(small.total_norm(model))
            optimizer.step()
        result[str(radius)] = {
            "back": back,
            "ratio": back[-1] / back[0],
            "loss": losses,
            "norm": norms,
            "first_loss": losses[0],
            "last_loss": sum(losses[-20:]) / 20,
            "largest_norm": max(norms),
            "median_norm": sorted(norms)[100],
        }
    return result


def rnn_back(data: dict) -> Figure:
    figure, axes = panels(height=3.0)
    for (radius, run), color in zip(data["rnn"].items(), (BLUE, GREEN, RED), strict=True):
        axes.plot(run["back"], color=color, label=f"W = {radius} × rotation")
    label(
        axes,
        x="time steps back from the loss",
        y="norm of the gradient at that state",
        legend=True,
        yscale="log",
    )
    return figure


def rnn_training(data: dict) -> Figure:
    figure, axes = panels(1, 2, height=2.8)
    for (radius, run), color in zip(data["rnn"].items(), (BLUE, GREEN, RED), strict=True):
        axes[0].plot(small.smooth(run["loss"]), color=color, label=f"{radius} × rotation")
        axes[1].plot(run["norm"], color=color, lw=1.1)
    axes[0].axhline(1.3863, color=GREY, ls=":", lw=1.2)
    axes[0].text(200, 1.41, "guessing: ln 4", color=GREY, fontsize=8, ha="right")
    label(axes[0], "loss (smoothed)", "training step", "cross-entropy", legend=True)
    label(axes[1], "norm of the gradient", "training step", yscale="log")
    return figure


def build(kind: str, layers: int = 24, dim: int = 64) -> nn.Module:
    """A deep network on 20 inputs, without normalization; `residual` adds each layer's output to its input."""
    torch.manual_seed(5)
    activation: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
    parts: list[nn.Module] = [nn.Linear(20, dim)]
    for _ in range(layers):
        layer = nn.Linear(dim, dim)
        gain = {
            "sigmoid": 1.0,
            "tanh": 1.0,
            "relu": 2**0.5,
            "relu, twice He's": 2 * 2**0.5,
            "residual": 2**0.5,
        }[kind]
        nn.init.normal_(layer.weight, std=gain * dim**-0.5)
        nn.init.zeros_(layer.bias)
        block = nn.Sequential(layer, activation.get(kind, nn.ReLU)())
        parts.append(Shortcut(block, layers**-0.5) if kind == "residual" else block)
    return nn.Sequential(*parts, nn.Linear(dim, 4))


class Shortcut(nn.Module):
    def __init__(self, block: nn.Module, factor: float) -> None:
        super().__init__()
        self.block, self.factor = block, factor

    def forward(self, x: Tensor) -> Tensor:
        return x + self.factor * self.block(x)


def deep() -> dict[str, Any]:
    """For five kinds of a 24-layer network: norms by layer before training, and the losses of training."""
    draw = small.generator(6)
    teacher = torch.randn(20, 4, generator=draw)
    result: dict[str, Any] = {}
    for kind in ("sigmoid", "tanh", "relu", "relu, twice He's", "residual"):
        model, draw = build(kind), small.generator(7)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        layers, losses = [], []
        for step in range(300):
            x = torch.randn(64, 20, generator=draw)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), (x @ teacher).argmax(-1))
            loss.backward()
            if step == 0:
                weights = [p.grad for p in model.parameters() if p.dim() == 2 and p.grad is not None]
                layers = [float(g.norm()) for g in weights[1:-1]]
            losses.append(loss.item())
            optimizer.step()
        end = losses[-20:]
        result[kind] = {
            "layers": layers,
            "ratio": layers[0] / layers[-1],
            "loss": small.smooth([min(x, 50.0) if x == x else 50.0 for x in losses]),
            "last_loss": sum(end) / 20,
            "diverged": not max(end) < 50,
        }
    return result


def deep_layers(data: dict) -> Figure:
    figure, axes = panels(1, 2, height=3.0)
    for (kind, run), color in zip(data["deep"].items(), (PURPLE, BLUE, GREEN, RED, ORANGE), strict=True):
        axes[0].plot(range(1, 25), run["layers"], "o-", ms=2.5, color=color, label=kind)
        axes[1].plot(run["loss"], color=color, label=kind)
    label(
        axes[0],
        "before training",
        "layer (1 is next to the input)",
        "norm of the weight's gradient",
        yscale="log",
    )
    label(axes[1], "training", "step", "loss (smoothed)", legend=True, ylim=(0, 3.2))
    return figure


def healthy() -> dict[str, Any]:
    """A small transformer that is trained as one should be: warm-up, cosine, clipping that is rarely needed."""
    model = small.Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1)
    trace = small.train(
        model, small.batches(16), 600, optimizer, small.warmup_cosine(1e-2, 600, 60), max_norm=1.0
    )
    ordered = sorted(trace.norm[60:])
    return {
        "loss": trace.loss,
        "norm": trace.norm,
        "first_norm": trace.norm[0],
        "median": ordered[len(ordered) // 2],
        "p99": ordered[int(0.99 * len(ordered))],
        "spread": ordered[int(0.99 * len(ordered))] / ordered[len(ordered) // 2],
        "clipped": sum(norm > 1.0 for norm in trace.norm),
    }


def healthy_curves(data: dict) -> Figure:
    run = data["healthy"]
    figure, axes = panels(1, 2, height=2.8)
    for ax, name in zip(axes, ("loss", "norm"), strict=True):
        ax.plot(run[name], color=BLUE, lw=0.7, alpha=0.45)
        ax.plot(small.smooth(run[name], 0.95), color=BLUE)
        ax.axvspan(0, 60, color=ORANGE, alpha=0.12, lw=0)
    axes[0].text(64, 3.35, "warm-up of the\nlearning rate", color=ORANGE, va="top", fontsize=8.5)
    label(axes[0], "loss", "step", "cross-entropy")
    label(axes[1], "norm of the gradient", "step", ylim=(0, None))
    return figure


RUNS = {"rnn": rnn, "rnn_adam": rnn_adam, "deep": deep, "healthy": healthy}
PICTURES = {
    "rnn_back": rnn_back,
    "rnn_training": rnn_training,
    "deep_layers": deep_layers,
    "healthy_curves": healthy_curves,
}
