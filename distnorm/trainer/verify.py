"""`distnorm verify`: proof that a config's topology gives the norm of the whole gradient."""

from __future__ import annotations

from distnorm import Config, verify
from distnorm.trainer.run import build
from distnorm.trainer.world import open_world

_WARM_UP_STEPS = 2


def main(config: Config) -> int:
    """Train a few steps on the config's topology and verify the next gradient; every rank calls it.

    Nothing is written: `train.output_dir` and checkpoints are left alone.

    Returns:
        0 where every check holds, else 1; the same on every rank.

    Raises:
        DistnormError: on every rank: the topology can't be built.
    """
    with open_world(config) as world:
        trainer = build(config, world)
        for step in range(1, _WARM_UP_STEPS + 1):
            trainer.compute_gradient(step)
            trainer.update()
        trainer.compute_gradient(_WARM_UP_STEPS + 1)
        report = verify([trainer.engine.module], config, tied=trainer.engine.tied)
        if world.rank == 0:
            print(report, flush=True)
        return 0 if report.ok else 1
