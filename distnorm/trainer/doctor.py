"""`distnorm doctor` and `distnorm dump`: a config's gradients against the whole model's in one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from distnorm import Config, DoctorReport, RunError, doctor, dump
from distnorm.trainer.job import Job
from distnorm.trainer.model import Transformer, build_model, mean_loss
from distnorm.trainer.run import build
from distnorm.trainer.topology import AXES
from distnorm.trainer.torch_trainer import TorchTrainer
from distnorm.trainer.world import World, open_world

_STEP = 1


def main(
    config: Config,
    against: Config | Path,
    trace: bool = False,
    json_file: str | None = None,
    page_file: str | None = None,
) -> int:
    """Compare the gradients of the first step; every rank calls it.

    Args:
        config: the topology under examination.
        against: the config of a single process, which the first rank runs; or the folder of a dump.
        trace: whether what goes in and out of every module is compared too.
        json_file: where the report is written as JSON; `None` for nowhere.
        page_file: where it is written as an HTML page, likewise.

    Returns:
        0 where every gradient is right, else 1; the same on every rank.

    Raises:
        DistnormError: on every rank: the topology can't be built, or there is no reference.
    """
    with open_world(config) as world:
        return check_gradients(config, against, world, trace, json_file, page_file)


def check_gradients(
    config: Config,
    against: Config | Path,
    world: World,
    trace: bool = False,
    json_file: str | None = None,
    page_file: str | None = None,
) -> int:
    """What `main` does, among ranks that are there already. Collective."""
    trainer = make_trainer(config, world)
    if isinstance(against, Config):
        _check_single(against)
        reference: Callable[..., Transformer] | Path = whole_model(against, trainer.job)
    else:
        reference = against
    report = examine(trainer, reference, trace)
    if world.rank == 0:
        print(report, flush=True)
        if json_file is not None:
            Path(json_file).write_text(report.to_json(), encoding="utf-8")
        if page_file is not None:
            Path(page_file).write_text(report.to_html(), encoding="utf-8")
    return 0 if report.ok else 1


def main_dump(config: Config, folder: str) -> int:
    """Write the first step's gradients, weights, batch digests and plan to a folder; every rank calls it."""
    with open_world(config) as world:
        trainer = make_trainer(config, world)
        trainer.compute_gradient(_STEP)
        inputs, _ = trainer.job.batch(_STEP)
        dump([trainer.engine.module], folder, tied=trainer.engine.tied, batch=inputs)
        if world.rank == 0:
            print(folder, flush=True)
        return 0


def make_trainer(config: Config, world: object) -> TorchTrainer:
    """Build a config's trainer without its monitor. Collective.

    Raises:
        RunError: it is DeepSpeed's, whose gradients can't be read before its step.
    """
    if config.train.parallel.backend == "deepspeed":
        raise RunError("doctor: expected ddp, fsdp1 or fsdp2 in train.parallel.backend, found deepspeed")
    trainer = build(config.model_copy(update={"monitor": type(config.monitor)()}), world)  # type: ignore[arg-type]
    assert isinstance(trainer, TorchTrainer)
    return trainer


def examine(trainer: TorchTrainer, reference: Callable[..., Transformer] | Path, trace: bool) -> DoctorReport:
    """Compute the first step's gradient under the doctor's eyes. Collective."""
    topology, engine = trainer.job.topology, trainer.engine
    microbatches = engine.microbatches if engine.pipelined else 1
    with doctor(
        [engine.module],
        reference=reference,
        mesh=topology.mesh,
        tied=engine.tied,
        parts=topology.data_degree * microbatches,
        microbatches=microbatches,
        trace=trace,
    ) as examination:
        trainer.compute_gradient(_STEP)
    assert examination.report is not None
    return examination.report


def whole_model(config: Config, job: Job) -> Callable[..., Transformer]:
    """The reference: the whole model in this process, over all or a part of the first step's global batch."""
    model = build_model(config).to(device=job.world.device, dtype=getattr(torch, config.train.dtype))

    def run(part: int = 0, parts: int = 1) -> Transformer:
        inputs, targets = (rows.to(job.world.device) for rows in job.text.batch(_STEP, part, parts))
        (mean_loss(model(inputs), targets) / parts).backward()  # type: ignore[no-untyped-call]
        return model

    return run


def _check_single(config: Config) -> None:
    ranks = math.prod(int(getattr(config.train.parallel, axis)) for axis in AXES)
    if ranks > 1:
        raise RunError(
            f"--against: expected the config of a single process, found one of {ranks} ranks; "
            "write a dump of that run with `distnorm dump`, and give its folder"
        )
