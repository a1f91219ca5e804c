"""`distnorm train`: the loop."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distnorm import Config, RunError
from distnorm.trainer.console import open_console
from distnorm.trainer.interrupt import Interrupt
from distnorm.trainer.job import Job, Trainer, make_job
from distnorm.trainer.model import build_model, parameter_count
from distnorm.trainer.progress import Part, Progress
from distnorm.trainer.rundir import Existing, Start, claim, find_start, set_aside, write_config
from distnorm.trainer.torch_trainer import TorchTrainer
from distnorm.trainer.world import World, open_world

INTERRUPTED = 130
"""The exit code after Ctrl-C, as in a shell."""


def main(config: Config, existing: Existing = "refuse") -> int:
    """Train as the config says; every rank calls it. Metrics go to `<output_dir>/metrics.jsonl`.

    Args:
        config: what to train.
        existing: what to do if the folder holds a run of this config already: refuse it, resume it from its
            newest checkpoint, or start anew. Rows that would be written over are moved into `earlier-N`.

    Returns:
        0, or 130 where a signal stopped it after a finished step.

    Raises:
        DistnormError: on every rank, before anything is overwritten.
    """
    with open_world(config) as world:
        with (progress := Progress(config.train.timeout)).naming():
            start = find_start(config, world, existing)
            progress.at(0, Part.MODEL)
            trainer = build(_watched(config), world)
            progress.at(0, Part.LOAD)
            done = trainer.load(start.checkpoint) if start.checkpoint is not None else 0
        with ExitStack() as held:
            code = _train(trainer, config, start, done, held)
        if code == 0:
            _say(world, str(Path(config.train.output_dir, "metrics.jsonl")))
        return code


def build(config: Config, world: World) -> Trainer:
    """Make the model on its topology, its optimizer and what clips. Collective.

    Raises:
        RunError: the text can't be read, ranks read different texts, or DeepSpeed can't do it.
    """
    job = make_job(config, world)
    model = build_model(config)
    if config.train.parallel.backend == "deepspeed":
        from distnorm.trainer.deepspeed_trainer import DeepSpeedTrainer

        return DeepSpeedTrainer(job, model)
    return TorchTrainer(job, model)


def _train(trainer: Trainer, config: Config, start: Start, done: int, held: ExitStack) -> int:
    world, clipper = trainer.job.world, trainer.clipper
    steps, every = config.train.steps, config.train.checkpoint.every
    _say(world, _headline(trainer.job, done))
    if done >= steps:  # a finished run's folder stays as it is
        return 0
    with trainer.job.progress.naming():
        trainer.job.progress.at(0, Part.FOLDER)
        earlier = world.together("train.output_dir", lambda: _claim_folder(config, world, start, held))
    if earlier:
        _say(world, f"the rows of the run that was there are kept in {earlier}")
    console = open_console(config.monitor.console, done, steps, quiet=world.rank != 0)
    assert clipper.monitor is not None
    with clipper.monitor, closing(clipper), console, Interrupt() as interrupt:
        for step in range(done + 1, steps + 1):
            with trainer.job.progress.naming():
                row, stop = _one_step(trainer, step, interrupt)
            console.row(row)
            stopped = stop and step < steps
            if every is not None and (stopped or step % every == 0):
                with trainer.job.progress.naming():
                    trainer.job.progress.at(step, Part.CHECKPOINT)
                    trainer.save(step)
            if stopped:
                saved = "" if every is None else "; its checkpoint is saved, and --resume goes on from there"
                console.say(f"stopped by a signal after step {step} of {steps}{saved}")
                return INTERRUPTED
    return 0


def _claim_folder(config: Config, world: World, start: Start, held: ExitStack) -> Path | None:
    if world.rank != 0:
        return None
    held.enter_context(claim(config, start))
    earlier = set_aside(config, start)
    write_config(config)
    return earlier


def _watched(config: Config) -> Config:
    """The config of a run whose clipper writes what it finds into the run's folder."""
    monitor = config.monitor.model_copy(update={"dir": config.train.output_dir})
    return config.model_copy(update={"monitor": monitor})


def _one_step(trainer: Trainer, step: int, interrupt: Interrupt) -> tuple[dict[str, Any], bool]:
    """Make a step on all ranks; the metrics row, and whether any rank got a signal to stop."""
    job = trainer.job
    began = time.perf_counter()
    share, _ = trainer.step(step)
    totals = torch.stack([share, share.new_tensor(float(interrupt.requested))])
    job.progress.at(step, Part.ROW)
    if dist.is_initialized():
        dist.all_reduce(totals)
    loss, stops = totals.tolist()
    _check_stops(stops, job.world, step)
    job.world.synchronize()
    train = job.config.train
    rate = train.data.batch_size * train.model.context / (time.perf_counter() - began)
    row = trainer.clipper.flush(loss=loss, tokens_per_second=rate, learning_rate=train.optimizer.lr)
    assert row is not None
    return row, stops > 0


def _check_stops(stops: float, world: World, step: int) -> None:
    """Refuse sums that are not those of what all ranks brought."""
    if stops not in range(world.size + 1):
        raise RunError(
            f"step {step}'s row: expected to add up what every rank brings to it, found that it met another "
            "reduction: a rank left out clip(), or called it twice"
        )


def _headline(job: Job, done: int) -> str:
    train, world = job.config.train, job.world
    axes = [(axis, job.topology.degree(axis)) for axis in ("pp", "dp_replicate", "dp_shard", "tp")]
    layout = " x ".join(f"{axis} {degree}" for axis, degree in axes if degree > 1) or "single process"
    backend: str = train.parallel.backend
    if backend == "deepspeed":
        backend += f" ZeRO {train.deepspeed.zero_stage}"
    resumed = f", going on after step {done}" if done else ""
    ranks = f"{world.size} rank{'s' if world.size > 1 else ''} on {world.device.type}"
    return (
        f"{ranks}: {backend}, {layout}; {parameter_count(job.config):,} parameters, {train.dtype}; "
        f"text: {job.text.source}{resumed}"
    )


def _say(world: World, text: str) -> None:
    if world.rank == 0:
        print(text, flush=True)
