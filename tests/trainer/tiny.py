"""A model small enough for a topology to train in a second, and rank bodies that train it."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from distnorm import Config, load_config
from distnorm.trainer import run
from distnorm.trainer.rundir import Existing

CONFIGS = Path(__file__).parents[2] / "configs"
TEXT = Path(__file__).with_name("numbers.txt")

TINY = (
    "clip.max_norm=0.25",
    "train.steps=3",
    "train.dtype=float64",
    "train.device=cpu",
    f"train.data.path={TEXT}",  # the default text differs from one Python to the next
    "train.model={dim: 32, layers: 2, heads: 4, context: 16, tie_embeddings: true}",
)


def shipped(name: str, output_dir: Path, *overrides: str) -> Config:
    """A shipped config's topology with the tiny model."""
    return load_config(CONFIGS / f"{name}.yaml", [*TINY, f"train.output_dir={output_dir}", *overrides])


def rank_count(config: Config) -> int:
    parallel = config.train.parallel
    return parallel.dp_replicate * parallel.dp_shard * parallel.tp * parallel.pp


def train(config: Config, existing: Existing = "resume") -> tuple[int, str]:
    """The exit code and what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = run.main(config, existing)
    return code, printed.getvalue()


def rows(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def trace(output_dir: Path, keys: Sequence[str] = ("step", "loss", "grad_norm", "clip_coef")) -> list[Any]:
    return [[row[key] for key in keys] for row in rows(output_dir)]


def contents(folder: Path) -> Mapping[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def written_config(output_dir: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((output_dir / "config.yaml").read_text())
    return loaded
