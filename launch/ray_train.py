"""The reference trainer on Ray Train's workers.

    python launch/ray_train.py CONFIG --workers 8 [--gpu] [--set a.b=VALUE]... [--storage FOLDER]

Ray starts the workers and makes their process group, which the trainer uses. With `train.checkpoint.every` a
group that failed is started again, and goes on from the newest checkpoint in `train.output_dir`. All nodes
have to share the folder that this is called in, and that one.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from distnorm import ConfigError, load_config


def train(task: dict[str, Any]) -> None:
    """What each worker does, in the folder that this was called in: relative paths are meant from there."""
    os.chdir(task["folder"])
    from distnorm.trainer import run

    config = load_config(task["config"], task["overrides"])
    if code := run.main(config, "resume"):
        raise SystemExit(code)
    rows = Path(config.train.output_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ray.train.report(json.loads(rows[-1]))


def main() -> None:
    """Start the workers, and wait for them."""
    parser = argparse.ArgumentParser(description="Run the reference trainer on Ray Train's workers.")
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--workers", type=int, required=True, metavar="N")
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[])
    parser.add_argument("--storage", metavar="FOLDER", help="where Ray keeps its own results")
    parser.add_argument("--failures", type=int, default=3, metavar="N", help="how often to start again")
    asked = parser.parse_args()
    try:  # a mistake in the configuration is none that other workers would not make
        config = load_config(asked.config, asked.overrides)
    except ConfigError as error:
        parser.exit(2, f"{error}\n")
    task = {"folder": os.getcwd(), "config": asked.config, "overrides": asked.overrides}
    storage = None if asked.storage is None else str(Path(asked.storage).resolve())
    trainer = TorchTrainer(
        train,
        train_loop_config=task,
        scaling_config=ScalingConfig(num_workers=asked.workers, use_gpu=asked.gpu),
        run_config=RunConfig(storage_path=storage, failure_config=FailureConfig(max_failures=asked.failures)),
    )
    trainer.fit()
    print(Path(config.train.output_dir, "metrics.jsonl").resolve())


if __name__ == "__main__":
    main()
