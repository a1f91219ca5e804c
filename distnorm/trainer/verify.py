"""`distnorm verify`: proof that a config's topology gives the norm of the whole gradient."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from distnorm import Config, RunError, load_config, verify
from distnorm.trainer.doctor import check_gradients
from distnorm.trainer.model import build_model, mean_loss, parameter_count
from distnorm.trainer.run import build
from distnorm.trainer.torch_trainer import TorchTrainer
from distnorm.trainer.world import open_world

_WARM_UP_STEPS = 2
_STEPS = 3
# Of a norm computed in the dtype throughout; fp64 is what decides it.
_TOLERANCES = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 2e-2}


def main(
    config: Config,
    against: Config | Path | None = None,
    trace: bool = False,
    json_file: str | None = None,
    page_file: str | None = None,
) -> int:
    """Train a few steps on the config's topology and verify the gradient; every rank calls it.

    With a reference the doctor's page follows: each gradient of the first step, against one process's.

    Where the gradient can be read between backward and step it is verified as `distnorm.verify` does, after
    two steps of training. DeepSpeed's can't be: there the norms of three steps, whose learning rate is 0, are
    compared with those of one process that has the whole model in fp64.
    Nothing is written but what is asked for: `train.output_dir` and checkpoints are left alone.

    Args:
        config: the topology.
        against, trace, json_file, page_file: as for `distnorm.trainer.doctor.main`.

    Returns:
        0 where every check holds, else 1; the same on every rank.

    Raises:
        DistnormError: on every rank: the topology can't be built.
    """
    if config.train.parallel.backend == "deepspeed":
        if against is not None:
            raise RunError("verify: expected no --against with DeepSpeed, whose gradients can't be read")
        return _against_the_whole_model(config)
    with open_world(config) as world:
        trainer = build(_unwatched(config), world)
        assert isinstance(trainer, TorchTrainer)
        for step in range(1, _WARM_UP_STEPS + 1):
            trainer.step(step)
        trainer.compute_gradient(_WARM_UP_STEPS + 1)
        report = verify([trainer.engine.module], config, tied=trainer.engine.tied)
        if world.rank == 0:
            print(report, flush=True)
        code = 0 if report.ok else 1
        if against is not None:
            code |= check_gradients(config, against, world, trace, json_file, page_file)
        return code


def _against_the_whole_model(config: Config) -> int:
    values = _unwatched(config).model_dump()
    values["train"]["optimizer"] |= {"lr": 0.0, "weight_decay": 0.0}
    tolerance, order = _TOLERANCES[config.train.dtype], config.norm.type
    with open_world(config) as world:
        trainer = build(load_config(values), world)
        checks = []
        for step in range(1, _STEPS + 1):
            _, result = trainer.step(step)
            found, expected = float(result.total_norm), _whole_norm(trainer.job.text.batch(step), config)
            checks.append(
                (math.isclose(found, expected, rel_tol=tolerance), f"step {step}  {found!r} for {expected!r}")
            )
            checks.append((len(set(world.gather(found))) == 1, f"step {step}  the same bits on every rank"))
        verdicts = [ok for ok, _ in checks]
        if world.rank == 0:
            verdict = (
                "verified" if all(verdicts) else f"{verdicts.count(False)} of {len(checks)} checks FAILED"
            )
            print(
                f"gradient norm {verdict} on {world.size} rank{'s' if world.size > 1 else ''} "
                f"(p = {order:g}, {parameter_count(config):,} elements, within {tolerance:g})"
            )
            for ok, text in checks:
                print(f"  {'ok  ' if ok else 'FAIL'}  {text}", flush=True)
        return 0 if all(all(theirs) for theirs in world.gather(verdicts)) else 1


def _unwatched(config: Config) -> Config:
    return config.model_copy(update={"monitor": type(config.monitor)()})


def _whole_norm(batch: tuple[torch.Tensor, torch.Tensor], config: Config) -> float:
    """The norm of the gradient at the initial weights, by one process in fp64."""
    model = build_model(config).to(getattr(torch, config.train.dtype)).double()
    mean_loss(model(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return float(torch.linalg.vector_norm(gradient, config.norm.type))
