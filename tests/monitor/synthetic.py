"""A made-up run: `python -m tests.monitor.synthetic FOLDER [STEPS LAYERS EVERY]` writes it."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PARTS = ("ln1.weight", "attn.wq.weight", "attn.wk.weight", "attn.wv.weight", "attn.wo.weight")
PARTS += ("ln2.weight", "ffn.w1.weight", "ffn.w2.weight")
CONFIG = """\
norm:
  type: 2.0
clip:
  max_norm: {max_norm}
  policy: {{name: zclip, alpha: 0.97, z_threshold: 2.5}}
  nonfinite: skip
monitor:
  every: {every}
  by: parameter
train:
  seed: {seed}
  steps: {steps}
  output_dir: runs/synthetic
  optimizer: {{name: adamw, lr: {lr}, fused: true}}
  parallel: {{backend: fsdp2, dp_replicate: 1, dp_shard: 2, tp: 2, pp: 1}}
"""


def layer_names(count: int) -> list[str]:
    names = ["tok.weight"]
    names += [f"blocks.{place // len(PARTS)}.{PARTS[place % len(PARTS)]}" for place in range(count - 2)]
    return [*names, "head.weight"][:count]


def plain(value: object) -> object:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_lines(file: Path, rows: Iterator[Mapping[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps({key: plain(value) for key, value in row.items()}, allow_nan=False) + "\n")


def metric_row(step: int, norm: float, threshold: float = 1.0, **more: Any) -> dict[str, Any]:
    """A row of a run with one threshold; torch's coefficient."""
    coef = min(1.0, threshold / (norm + 1e-6)) if math.isfinite(norm) else 1.0
    return {
        "step": step,
        "loss": 3.0 / step,
        "grad_norm": norm,
        "clip_coef": coef,
        "clipped_norm": norm * coef,
        "threshold": threshold,
        "clipped": coef < 1,
        "finite": math.isfinite(norm),
        "tokens_per_second": 1000.0,
        **more,
    }


def write_run(
    folder: Path, steps: int = 400, layers: int = 50, every: int = 1, seed: int = 0, lr: float = 3e-3
) -> Path:
    """A run with spikes, an adaptive threshold, bad steps, a layer that dies and one that grows."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    rows = list(metric_rows(steps, chance, lr))
    write_lines(folder / "metrics.jsonl", iter(rows))
    if layers:
        write_lines(
            folder / "layers.jsonl", layer_rows(rows[every - 1 :: every], layer_names(layers), chance)
        )
    write_lines(folder / "alerts.jsonl", alert_rows(steps, layer_names(layers)))
    text = CONFIG.format(max_norm=1.0, every=every, seed=seed, steps=steps, lr=lr)
    (folder / "config.yaml").write_text(text)
    return folder


def metric_rows(steps: int, chance: random.Random, lr: float) -> Iterator[dict[str, Any]]:
    window: list[bool] = []
    average = 2.5
    for step in range(1, steps + 1):
        done = step / steps
        norm = (0.35 + 2.2 * math.exp(-14 * done)) * math.exp(chance.gauss(0, 0.16)) * (lr / 3e-3) ** 0.3
        if chance.random() < 0.012:
            norm *= chance.uniform(3, 14)
        if step in (steps // 3, steps // 3 + 1, steps * 4 // 5):
            norm = math.nan if step % 2 else math.inf
        finite = math.isfinite(norm)
        threshold = average * 1.45
        clipped = finite and norm > threshold
        coef = threshold / (norm + 1e-6) if clipped else 1.0
        skipped = not finite or norm > 12 * average
        if finite:
            average = 0.97 * average + 0.03 * min(norm, threshold)
        window = [*window[-99:], clipped]
        loss = 2.1 + 3.4 * math.exp(-7 * done * (lr / 3e-3) ** 0.5) + chance.gauss(0, 0.03)
        yield {
            "step": step,
            "loss": loss,
            "grad_norm": norm,
            "clip_coef": coef,
            "clipped_norm": norm * coef,
            "threshold": threshold,
            "clipped": clipped,
            "finite": finite,
            "tokens_per_second": chance.gauss(181_000, 2500),
            "learning_rate": lr * min(1.0, 20 * done, 1.1 - done),
            "time": 1.75e9 + 0.75 * step,
            "skipped": skipped,
            "clip_rate": sum(window) / len(window),
            "noise_scale": None,
        }


def layer_rows(
    rows: list[dict[str, Any]], names: list[str], chance: random.Random
) -> Iterator[dict[str, Any]]:
    dying, growing = len(names) // 3, len(names) * 2 // 3
    weights = [math.exp(chance.gauss(0, 0.5) - (1.6 if ".ln" in name else 0)) for name in names]
    for place, row in enumerate(rows):
        done = place / len(rows)
        total = row["grad_norm"] / math.sqrt(len(names))
        for layer, name in enumerate(names):
            norm = total * weights[layer] * math.exp(chance.gauss(0, 0.25)) * 0.4 ** (layer / len(names))
            if layer == dying:
                norm = 0.0 if done > 0.85 else norm * math.exp(-14 * max(0.0, done - 0.3))
            if layer == growing:
                norm *= math.exp(4 * max(0.0, done - 0.5))
            yield {
                "step": row["step"],
                "layer": name,
                "norm": norm,
                "rms": norm / 256,
                "max": norm / 12,
                "zero_fraction": 1.0 if norm == 0 else 0.0,
                "grad_to_weight": norm / 40,
            }


def alert_rows(steps: int, names: list[str]) -> Iterator[dict[str, Any]]:
    if len(names) < 3 or steps < 20:
        return
    dying, growing = names[len(names) // 3], names[len(names) * 2 // 3]
    bad = steps // 3
    yield alert(
        bad, "non_finite", names[1], [2], math.nan, None, f"the gradient of {names[1]} is nan on rank 2"
    )
    yield alert(steps * 3 // 5, "exploding", growing, None, 31.4, 10.0, f"{growing}: 31.4 times its average")
    yield alert(
        steps * 17 // 20, "vanishing", dying, None, 0.0, 1e-9, f"{dying}: norm 0 is under the bound of 1e-09"
    )


def alert(
    step: int,
    kind: str,
    layer: str | None,
    ranks: list[int] | None,
    value: float,
    bound: float | None,
    text: str,
) -> dict[str, Any]:
    found = None if math.isnan(value) else value
    return {
        "step": step,
        "kind": kind,
        "layer": layer,
        "ranks": ranks,
        "value": found,
        "bound": bound,
        "message": text,
    }


if __name__ == "__main__":
    # The run of docs/report.png by default; 2000 300 1 is that of the report's limits, 10 s and 8 MB.
    target, steps, layers, every = (*sys.argv[1:], "2000", "42", "25")[:4]
    write_run(Path(target), int(steps), int(layers), int(every), seed=3)
