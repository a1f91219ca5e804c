"""`distnorm train`: the loop."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from distnorm import ClipResult, Config, GradClipper, RunError
from distnorm.trainer.checkpoint import load_checkpoint, save_checkpoint
from distnorm.trainer.data import Text
from distnorm.trainer.engine import Engine
from distnorm.trainer.interrupt import Interrupt
from distnorm.trainer.metrics import METRICS_FILE, MetricsWriter, Row
from distnorm.trainer.optimizer import make_optimizer
from distnorm.trainer.rundir import find_start, write_config
from distnorm.trainer.world import World, open_world

INTERRUPTED = 130
"""The exit code after Ctrl-C, as in a shell."""


def main(config: Config) -> int:
    """Train as the config says; every rank calls it. Metrics go to `<output_dir>/metrics.jsonl`.

    Returns:
        0, or 130 where a signal stopped it after a finished step.

    Raises:
        DistnormError: on every rank, before anything is overwritten.
    """
    with open_world(config) as world:
        start = find_start(config, world)
        trainer = build(config, world)
        done = 0
        if start.checkpoint is not None:
            done = load_checkpoint(start.checkpoint, trainer.engine, trainer.optimizer, trainer.clipper)
        code = _train(trainer, done)
        if code == 0:
            _say(world, str(Path(config.train.output_dir, METRICS_FILE)))
        return code


@dataclass(frozen=True, slots=True)
class Trainer:
    """What one step needs."""

    engine: Engine
    optimizer: Optimizer
    clipper: GradClipper

    def compute_gradient(self, step: int) -> torch.Tensor:
        """Fill the gradients of step `step`, unclipped. Collective.

        Returns:
            This rank's share of the loss, as `Engine.backward` says.
        """
        self.optimizer.zero_grad()
        return self.engine.backward(step)

    def update(self) -> ClipResult:
        """Clip the gradients and apply them. Collective."""
        result = self.clipper.clip()
        if self.engine.config.clip.nonfinite != "skip" or bool(result.is_finite):
            self.optimizer.step()
        return result


def build(config: Config, world: World) -> Trainer:
    """Make the model, optimizer and clipper on their topology. Collective.

    Raises:
        RunError: the text can't be read, or ranks read different texts.
    """
    text = world.together("train.data.path", lambda: Text(config))
    digests = world.gather(text.digest)
    if len(set(digests)) > 1:
        rank = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
        raise RunError(
            f"train.data.path: expected the same text on every rank, found another on rank {rank} than on "
            "rank 0; give all of them the same files"
        )
    engine = Engine(config, world, text)
    optimizer = make_optimizer(engine.named_parameters().values(), config)
    return Trainer(engine, optimizer, GradClipper([engine.module], config, tied=engine.tied))


def _train(trainer: Trainer, done: int) -> int:
    config, world = trainer.engine.config, trainer.engine.world
    steps, every = config.train.steps, config.train.checkpoint.every
    _say(world, _headline(trainer.engine, done))
    opened = world.together("train.output_dir", lambda: _open_run(config, world, done))
    with opened as metrics, Interrupt() as interrupt:
        for step in range(done + 1, steps + 1):
            row, stop = _one_step(trainer, step, interrupt)
            if metrics is not None:
                metrics.write(row)
            _say(world, _progress(row, steps))
            if every is not None and step % every == 0:
                save_checkpoint(trainer.engine, trainer.optimizer, trainer.clipper, step)
            if stop and step < steps:
                _say(world, f"stopped by a signal after step {step} of {steps}")
                return INTERRUPTED
    return 0


def _open_run(config: Config, world: World, done: int) -> AbstractContextManager[MetricsWriter | None]:
    """Make the run's folder and open its metrics, on rank 0; the others write nothing."""
    if world.rank != 0:
        return nullcontext()
    write_config(config)
    return MetricsWriter(Path(config.train.output_dir), done)


def _one_step(trainer: Trainer, step: int, interrupt: Interrupt) -> tuple[Row, bool]:
    """Make a step on all ranks; the metrics row, and whether any rank was told to stop."""
    engine = trainer.engine
    began = time.perf_counter()
    share = trainer.compute_gradient(step)
    result = trainer.update()
    totals = torch.stack([share, share.new_tensor(float(interrupt.requested))])
    if dist.is_initialized():
        dist.all_reduce(totals)
    loss, stops = totals.tolist()
    facts = result.to_dict()
    engine.world.synchronize()
    train = engine.config.train
    row = {
        "step": step,
        "loss": loss,
        "grad_norm": facts["total_norm"],
        "clip_coef": facts["clip_coef"],
        "clipped_norm": facts["clipped_norm"],
        "threshold": facts["threshold"],
        "clipped": facts["was_clipped"],
        "finite": facts["is_finite"],
        "tokens_per_second": train.data.batch_size * train.model.context / (time.perf_counter() - began),
    }
    return row, stops > 0


def _headline(engine: Engine, done: int) -> str:
    train, world = engine.config.train, engine.world
    axes = [(axis, engine.topology.degree(axis)) for axis in ("pp", "dp_replicate", "dp_shard", "tp")]
    layout = " x ".join(f"{axis} {degree}" for axis, degree in axes if degree > 1) or "single process"
    resumed = f", going on after step {done}" if done else ""
    ranks = f"{world.size} rank{'s' if world.size > 1 else ''} on {world.device.type}"
    return (
        f"{ranks}: {train.parallel.backend}, {layout}; {engine.parameter_count:,} parameters, {train.dtype}; "
        f"text: {engine.text.source}{resumed}"
    )


def _progress(row: Row, steps: int) -> str:
    return (
        f"step {row['step']:>{len(str(steps))}}/{steps}  loss {row['loss']:.4f}  "
        f"grad norm {row['grad_norm']:.4f}  coefficient {row['clip_coef']:.4f}  "
        f"{row['tokens_per_second']:,.0f} tokens/s"
    )


def _say(world: World, text: str) -> None:
    if world.rank == 0:
        print(text, flush=True)
