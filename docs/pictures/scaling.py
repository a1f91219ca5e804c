"""What a healthy norm depends on: batch, sequence, width, depth, size, and how far training has come."""

from __future__ import annotations

import math
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from docs.pictures import small
from docs.pictures.style import BLUE, GREEN, GREY, ORANGE, RED, label, panels


def slope(x: list[float], y: list[float]) -> float:
    """The exponent of a power law through the points."""
    u, v = [math.log(a) for a in x], [math.log(b) for b in y]
    mu, mv = sum(u) / len(u), sum(v) / len(v)
    return sum((a - mu) * (b - mv) for a, b in zip(u, v, strict=True)) / sum((a - mu) ** 2 for a in u)


def norm_of(model: nn.Module, batch: Tensor, factor: float = 1.0) -> float:
    model.zero_grad()
    (model(batch) * factor).backward()
    return small.total_norm(model)


def batch_size() -> dict[str, Any]:
    """The mean squared norm over batches of several sizes, at one point of training, and the line through it in 1/B."""
    model, data = small.Transformer(), small.batches(16)
    small.train(model, data, 150, torch.optim.AdamW(model.parameters(), lr=6e-3))
    sizes = [2**i for i in range(9)]
    squares = []
    for size in sizes:
        stream = small.batches(size, seed=100 + size)
        squares.append(
            sum(norm_of(model, next(stream)) ** 2 for _ in range(max(6, 96 // size))) / max(6, 96 // size)
        )
    ones, last = squares[0], squares[-1]
    noise = (ones - last) / (1 - 1 / sizes[-1])
    signal = ones - noise
    return {
        "size": sizes,
        "norm": [math.sqrt(x) for x in squares],
        "signal": math.sqrt(signal),
        "noise": math.sqrt(noise),
        "noise_scale": noise / signal,
        "one": math.sqrt(ones),
        "most": math.sqrt(last),
    }


def batch_picture(data: dict) -> Figure:
    run = data["batch_size"]
    figure, axes = panels(height=3.0)
    axes.plot(run["size"], run["norm"], "o", color=BLUE, label="measured")
    fit = [math.sqrt(run["signal"] ** 2 + run["noise"] ** 2 / b) for b in run["size"]]
    axes.plot(run["size"], fit, color=BLUE, lw=1.2, label="√(‖G‖² + tr Σ / B)")
    axes.axhline(run["signal"], color=GREEN, ls="--", lw=1.2, label="‖G‖, the true gradient")
    axes.plot(
        run["size"],
        [run["noise"] / math.sqrt(b) for b in run["size"]],
        color=ORANGE,
        ls=":",
        label="noise alone",
    )
    label(axes, "", "batch size B (sequences)", "norm", legend=True)
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", ylim=(0.04, None))
    return figure


def sequence() -> dict[str, Any]:
    """The norm for sequences of several lengths, under a loss that is a mean over tokens, and under a sum."""
    lengths = [8, 16, 32, 64, 128]
    result: dict[str, Any] = {"length": lengths, "mean": [], "sum": []}
    for length in lengths:
        model = small.Transformer(length=length)
        stream = small.batches(8, length, seed=9)
        norms = [norm_of(model, next(stream)) for _ in range(6)]
        result["mean"].append(sum(norms) / 6)
        result["sum"].append(8 * length * sum(norms) / 6)
    result["slope_sum"] = slope(lengths, result["sum"])
    result["slope_mean"] = slope(lengths, result["mean"])
    return result


def sequence_picture(data: dict) -> Figure:
    run = data["sequence"]
    figure, axes = panels(height=2.8)
    axes.plot(run["length"], run["mean"], "o-", color=BLUE, label="mean over tokens")
    axes.plot(run["length"], run["sum"], "o-", color=RED, label="sum over tokens")
    label(axes, "", "sequence length", "norm before training", legend=True, yscale="log")
    axes.set_xscale("log", base=2)
    return figure


class Wide(nn.Module):
    """Four layers; under `mup` the output is divided by the width (maximal update parametrization)."""

    def __init__(self, width: int, mup: bool, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(16, width, bias=False), nn.Linear(width, width, bias=False)
        self.third, self.last = nn.Linear(width, width, bias=False), nn.Linear(width, 8, bias=False)
        for layer in (self.first, self.second, self.third):
            nn.init.normal_(layer.weight, std=(2 / layer.in_features) ** 0.5)
        nn.init.normal_(self.last.weight, std=1.0 if mup else width**-0.5)
        self.factor = 1 / width if mup else 1.0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.relu(self.third(F.relu(self.second(F.relu(self.first(x))))))
        return F.cross_entropy(self.last(h) * self.factor, y)


def width() -> dict[str, Any]:
    """Global norms before training for several widths, in the standard parametrization and in muP."""
    widths = [32, 64, 128, 256, 512]
    draw = small.generator(12)
    x, y = torch.randn(128, 16, generator=draw), torch.randint(8, (128,), generator=draw)
    result: dict[str, Any] = {"width": widths}
    for name, mup in (("standard", False), ("mup", True)):
        norms, hidden = [], []
        for wide in widths:
            found = []
            for seed in range(8):
                model = Wide(wide, mup, seed)
                model(x, y).backward()
                found.append((small.total_norm(model), float(model.second.weight.grad.norm())))
            norms.append(sum(norm for norm, _ in found) / len(found))
            hidden.append(sum(norm for _, norm in found) / len(found))
        result[name] = {
            "norm": norms,
            "hidden": hidden,
            "slope": slope(widths, norms),
            "hidden_slope": slope(widths, hidden),
        }
    return result


def width_picture(data: dict) -> Figure:
    run = data["width"]
    figure, axes = panels(height=2.8)
    for name, color, text in (("standard", RED, "standard"), ("mup", GREEN, "muP")):
        axes.plot(run["width"], run[name]["norm"], "o-", color=color, label=f"{text}, whole model")
        axes.plot(
            run["width"],
            run[name]["hidden"],
            "s--",
            ms=4,
            lw=1,
            color=color,
            label=f"{text}, one hidden matrix",
        )
    label(axes, "", "width", "norm before training", legend=True, yscale="log")
    axes.set_xscale("log", base=2)
    return figure


class Deep(nn.Module):
    """Shortcuts around layers: `plain`, with branches `scaled` by 1/sqrt(layers), or behind a LayerNorm (`pre-norm`).

    A branch ends with a matrix, as in a transformer. Ended by the ReLU, whose mean isn't zero, it would add up over layers.
    """

    def __init__(self, kind: str, layers: int, dim: int = 64) -> None:
        super().__init__()
        torch.manual_seed(13)
        self.ins, self.outs = (
            nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(layers)) for _ in range(2)
        )
        for into, out in zip(self.ins, self.outs, strict=True):
            nn.init.normal_(into.weight, std=(2 / dim) ** 0.5)
            nn.init.normal_(out.weight, std=dim**-0.5)
        self.kind, self.factor = kind, layers**-0.5 if kind == "scaled" else 1.0
        self.head = nn.Linear(dim, 8, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for into, out in zip(self.ins, self.outs, strict=True):
            h = F.layer_norm(x, x.shape[-1:]) if self.kind == "pre-norm" else x
            x = x + self.factor * out(F.relu(into(h)))
        if self.kind == "pre-norm":
            x = F.layer_norm(x, x.shape[-1:])
        return F.cross_entropy(self.head(x), y)


def depth() -> dict[str, Any]:
    """Global norms before training for several depths of three kinds of residual network."""
    depths = [2, 4, 8, 16, 32, 64]
    draw = small.generator(14)
    x, y = torch.randn(128, 64, generator=draw), torch.randint(8, (128,), generator=draw)
    result: dict[str, Any] = {"depth": depths}
    for kind in ("plain", "scaled", "pre-norm"):
        norms = []
        for layers in depths:
            model = Deep(kind, layers)
            model(x, y).backward()
            norms.append(small.total_norm(model))
        result[kind] = {"norm": norms, "growth": norms[-1] / norms[0]}
    return result


def depth_picture(data: dict) -> Figure:
    run = data["depth"]
    figure, axes = panels(height=2.8)
    names = {"plain": "x + f(x)", "scaled": "x + f(x) / √L", "pre-norm": "x + f(LayerNorm(x))"}
    for (kind, text), color in zip(names.items(), (RED, GREEN, BLUE), strict=True):
        axes.plot(run["depth"], run[kind]["norm"], "o-", color=color, label=text)
    label(axes, "", "layers L", "norm before training", legend=True, yscale="log")
    axes.set_xscale("log", base=2)
    return figure


def size() -> dict[str, Any]:
    """Norms of transformers of four sizes, trained alike: at the start, and over steps 100 to 200."""
    result: dict[str, Any] = {"dim": [16, 32, 48, 64], "parameters": [], "start": [], "later": [], "loss": []}
    for dim in result["dim"]:
        model = small.Transformer(dim=dim)
        trace = small.train(model, small.batches(16), 200, torch.optim.AdamW(model.parameters(), lr=5e-3))
        result["parameters"].append(sum(p.numel() for p in model.parameters()))
        result["start"].append(trace.norm[0])
        result["later"].append(sum(trace.norm[100:]) / 100)
        result["loss"].append(sum(trace.loss[-20:]) / 20)
    return result


def size_picture(data: dict) -> Figure:
    run = data["size"]
    figure, axes = panels(height=2.6)
    axes.plot(run["parameters"], run["start"], "o--", color=GREY, label="at the start")
    axes.plot(run["parameters"], run["later"], "o-", color=BLUE, label="mean of steps 100 to 200")
    label(axes, "", "parameters", "norm", legend=True, xscale="log", ylim=(0, None))
    return figure


class Normed(nn.Module):
    """Three matrices, each before a LayerNorm without weights: the loss doesn't depend on the matrices' sizes."""

    def __init__(self, dim: int = 48) -> None:
        super().__init__()
        torch.manual_seed(15)
        self.layers = nn.ModuleList(nn.Linear(a, dim, bias=False) for a in (16, dim, dim))
        self.head = nn.Linear(dim, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(F.layer_norm(layer(x), (layer.out_features,)))
        return self.head(x)


def end(steps: int = 2000, peak: float = 1e-2, decay: float = 0.3) -> dict[str, Any]:
    """AdamW and AdamC with a learning rate that falls to zero: norms of the gradient and of the weights."""
    draw = small.generator(16)
    teacher = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    for p in teacher.parameters():
        p.data.normal_(0, 1.0, generator=draw)
    lr = small.warmup_cosine(peak, steps, 100)
    result: dict[str, Any] = {"lr": [lr(step) for step in range(0, steps, 10)]}
    for name in ("AdamW", "AdamC"):
        model, draw = Normed(), small.generator(17)
        groups = [
            {"params": model.layers.parameters()},
            {"params": model.head.parameters(), "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.99), weight_decay=decay)
        norms, sizes, losses = [], [], []
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr(step)
            if name == "AdamC":
                optimizer.param_groups[0]["weight_decay"] = decay * lr(step) / peak
            x = torch.randn(64, 16, generator=draw)
            y = (2 * teacher(x) + torch.randn(64, 8, generator=draw)).argmax(-1)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            norms.append(small.total_norm(model.layers))
            sizes.append(math.sqrt(sum(float(p.detach().square().sum()) for p in model.layers.parameters())))
            losses.append(loss.item())
            optimizer.step()
        middle, last = norms[steps // 4 : steps // 2], norms[-steps // 20 :]
        result[name] = {
            "norm": small.smooth(norms, 0.97)[::10],
            "raw": norms if name == "AdamW" else [],
            "weights": sizes[::10],
            "middle": sum(middle) / len(middle),
            "last": sum(last) / len(last),
            "growth": sum(last) / len(last) / (sum(middle) / len(middle)),
            "weights_growth": sizes[-1] / sizes[steps // 3],
            "loss": sum(losses[-100:]) / 100,
        }
    return result


def end_picture(data: dict) -> Figure:
    run = data["end"]
    figure, axes = panels(1, 3, height=2.6, width=7.6)
    steps = range(0, 10 * len(run["lr"]), 10)
    axes[0].plot(steps, run["lr"], color=GREY)
    for name, color in (("AdamW", RED), ("AdamC", GREEN)):
        axes[1].plot(steps, run[name]["norm"], color=color, label=name)
        axes[2].plot(steps, run[name]["weights"], color=color)
    label(axes[0], "learning rate", "step")
    label(axes[1], "norm of the gradient", "step", legend=True, ylim=(0, None))
    label(axes[2], "norm of the weights", "step", ylim=(0, None))
    return figure


RUNS = {
    "batch_size": batch_size,
    "sequence": sequence,
    "width": width,
    "depth": depth,
    "size": size,
    "end": end,
}
PICTURES = {
    "norm_batch": batch_picture,
    "norm_sequence": sequence_picture,
    "norm_width": width_picture,
    "norm_depth": depth_picture,
    "norm_size": size_picture,
    "norm_end": end_picture,
}
