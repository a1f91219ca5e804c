"""The same run on another number of ranks, for `distnorm plan`."""

from __future__ import annotations

import math

from distnorm.config.models import Config
from distnorm.errors import ConfigError


def degrees_of(config: Config) -> dict[str, int]:
    """The degrees, outermost axis first; they multiply to the number of ranks."""
    names = ("pp", "dp_replicate", "dp_shard", "tp")
    return {name: int(getattr(config.train.parallel, name)) for name in names}


def scaled_to(config: Config, world: int) -> Config:
    """The same run on another number of ranks: one of its data-parallel degrees is changed to fit.

    That is `dp_shard` where it is more than 1, else `dp_replicate` where that is, else whichever the backend
    grows by. The batch becomes as much larger as the degrees need, which no plan depends on.

    Raises:
        ConfigError: no value of that degree fits; the message says which numbers of ranks do.
    """
    parallel, degrees = config.train.parallel, degrees_of(config)
    grown = next((name for name in ("dp_shard", "dp_replicate") if degrees[name] > 1), _grown_by(config))
    others = math.prod(degrees.values()) // degrees[grown]
    if world < 1 or world % others:
        fixed = " x ".join(f"{name} {n}" for name, n in degrees.items() if name != grown and n > 1)
        below = world // others * others
        near = [n for n in (below, below + others) if n > 0]
        raise ConfigError(
            f"--world: expected a multiple of {others} ({fixed or 'one rank'}), whose other factor is "
            f"parallel.{grown}, found {world}; {' and '.join(map(str, near))} would fit, or set other degrees"
        )
    changed = parallel.model_copy(update={grown: world // others})
    divisor = changed.dp_replicate * changed.dp_shard
    if changed.pp > 1:
        divisor *= changed.microbatches or 2 * changed.pp
    batch = -(-config.train.data.batch_size // divisor) * divisor
    data = config.train.data.model_copy(update={"batch_size": batch})
    train = config.train.model_copy(update={"parallel": changed, "data": data})
    return config.model_copy(update={"train": train})


def _grown_by(config: Config) -> str:
    train = config.train
    replicates = train.parallel.backend == "ddp" or (
        train.parallel.backend == "deepspeed" and train.deepspeed.zero_stage == 0
    )
    return "dp_replicate" if replicates else "dp_shard"
