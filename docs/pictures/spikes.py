"""Six ways in which a norm jumps, each made on purpose in the same small run."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from docs.pictures import small
from docs.pictures.style import BLUE, GREY, ORANGE, RED, label, panels

STEPS, WHEN, LR = 240, 120, 6e-3
Start = tuple[nn.Module, torch.optim.Optimizer, Iterator[Tensor]]


def start(lr: float = LR) -> Start:
    model = small.Transformer()
    return model, torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99)), small.batches(16, seed=8)


def summary(trace: small.Trace, when: int = WHEN, **more: Any) -> dict[str, Any]:
    before = sorted(trace.norm[when - 50 : when])[25]
    return {
        "loss": trace.loss,
        "norm": trace.norm,
        "before": before,
        "at": trace.norm[when],
        "jump": trace.norm[when] / before,
        "loss_before": sum(trace.loss[when - 20 : when]) / 20,
        "loss_after": max(trace.loss[when : when + 10]),
        "loss_end": sum(trace.loss[-20:]) / 20,
        **more,
    }


def bad_batch(max_norm: float | None = None) -> dict[str, Any]:
    """One batch is a single symbol over and over: what a broken file or a page of dashes looks like."""
    model, optimizer, data = start()

    def with_one_bad() -> Iterator[Tensor]:
        for step, batch in enumerate(data):
            yield torch.full_like(batch, 7) if step == WHEN else batch

    return summary(small.train(model, with_one_bad(), STEPS, optimizer, max_norm=max_norm))


def lr_too_high() -> dict[str, Any]:
    """The learning rate grows by 3 % a step from step 60 on, until training breaks."""
    model, optimizer, data = start()
    trace = small.train(model, data, STEPS, optimizer, lambda step: LR * 1.03 ** max(0, step - 60))
    usual = sorted(trace.norm[:100])[50]
    mean = small.smooth(trace.loss, 0.8)
    norm_step = next(step for step in range(60, STEPS) if trace.norm[step] > 1.5 * usual)
    loss_step = next(step for step in range(60, STEPS) if mean[step] > min(mean[:step]) + 0.3)
    return summary(trace, norm_step=norm_step, loss_step=loss_step, lr_then=LR * 1.03 ** (norm_step - 60))


def fp16_overflow() -> dict[str, Any]:
    """Gradients are multiplied by a loss scale and stored in fp16; the scale doubles every 20 steps without overflow."""
    model, optimizer, data = start()
    trace, scale, since = small.Trace(), 2.0**12, 0
    scales, skipped = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(next(data))
        (loss * scale).backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad.copy_((p.grad.half().float()) / scale)
        norm = small.total_norm(model)
        trace.loss.append(loss.item())
        trace.norm.append(norm)
        scales.append(scale)
        since += 1
        if norm == float("inf") or norm != norm:
            skipped.append(step)
            scale, since = scale / 2, 0
        else:
            optimizer.step()
            if since == 20:
                scale, since = scale * 2, 0
    return summary(
        trace, scale=scales, skipped=skipped, first=skipped[0], number=len(skipped), top=max(scales)
    )


def dead_layer() -> dict[str, Any]:
    """From step 120 on a layer's inputs are cut off by a large negative bias, and it learns nothing any more."""
    model, optimizer, data = start()
    layer = model.blocks[0].up
    one: list[float] = []

    def watch(step: int) -> None:
        if step == WHEN - 1:
            with torch.no_grad():
                layer.bias.sub_(30.0)
        one.append(float(layer.weight.grad.norm()))

    trace = small.train(model, data, STEPS, optimizer, tamper=watch)
    return summary(trace, layer=one, layer_before=one[WHEN - 2], layer_after=one[WHEN + 20])


def flip(value: float, bit: int) -> float:
    """An fp32 number with one of its bits turned over."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0] ^ (1 << bit)
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def hardware_fault() -> dict[str, Any]:
    """At step 120 one bit of one element of the gradient turns over: the highest of its exponent.

    For each of the 32 bits it is also recorded what the norm would have been.
    """
    model, optimizer, data = start()
    found: list[float] = []
    bits: list[float] = []

    def tamper(step: int) -> None:
        if step == WHEN:
            flat = model.head.weight.grad.view(-1)
            old = float(flat[5])
            rest = small.total_norm(model) ** 2 - old**2
            bits.extend((rest + flip(old, bit) ** 2) ** 0.5 for bit in range(32))
            flat[5] = flip(old, 30)
            found.extend((old, float(flat[5])))

    trace = small.train(model, data, STEPS, optimizer, tamper=tamper)
    usual = sorted(trace.norm[WHEN - 50 : WHEN])[25]
    seen = sum(norm > 1.5 * usual for norm in bits)
    return summary(trace, element=found[0], flipped=found[1], bits=bits, seen=seen, unseen=32 - seen)


def other_ranks() -> dict[str, Any]:
    """From step 120 on the same run is logged by a function that counts both of two replicas."""
    model, optimizer, data = start()
    trace = small.train(model, data, STEPS, optimizer)
    trace.norm = [norm * (2**0.5 if step >= WHEN else 1.0) for step, norm in enumerate(trace.norm)]
    after = sorted(trace.norm[WHEN : WHEN + 50])[25]
    return summary(trace, level=after / sorted(trace.norm[WHEN - 50 : WHEN])[25])


def curves(name: str, note: str, data: dict) -> Figure:
    run = data[name]
    figure, axes = panels(1, 2, height=2.4)
    axes[0].plot(run["loss"], color=BLUE, lw=1.1)
    norms = [x if x is not None else float("nan") for x in run["norm"]]
    axes[1].plot(norms, color=BLUE, lw=1.1)
    for step in run.get("skipped", ()):
        axes[1].axvline(step, color=RED, lw=0.9, alpha=0.7)
    if "layer" in run:
        axes[1].plot(run["layer"], color=RED, lw=1.1, label="the dead layer alone")
        axes[1].legend(loc="lower right")
    for ax in axes:
        if name not in ("fp16_overflow", "lr_too_high"):
            ax.axvline(WHEN, color=ORANGE, ls="--", lw=1)
    level = name in ("fp16_overflow", "dead_layer", "other_ranks")
    label(axes[0], "loss", "step", yscale="log" if name == "lr_too_high" else "linear")
    label(
        axes[1],
        "norm of the gradient" + note,
        "step",
        **({"ylim": (0, 0.85)} if level else {"yscale": "log"}),
    )
    if "scale" in run:
        twin = axes[1].twinx()
        twin.plot(run["scale"], color=GREY, lw=1.1, drawstyle="steps-post")
        twin.set(yscale="log", ylabel="loss scale")
        twin.spines["right"].set_visible(True)
        twin.grid(False)
    return figure


RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    "bad_batch": bad_batch,
    "bad_batch_clipped": partial(bad_batch, 1.0),
    "lr_too_high": lr_too_high,
    "fp16_overflow": fp16_overflow,
    "dead_layer": dead_layer,
    "hardware_fault": hardware_fault,
    "other_ranks": other_ranks,
}
NOTES = {"fp16_overflow": " (red: inf, skipped)"}
PICTURES = {name: partial(curves, name, NOTES.get(name, "")) for name in RUNS if name != "bad_batch_clipped"}
