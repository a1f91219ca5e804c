"""What each command does. Each imports what it needs, and nothing that it doesn't."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distnorm.errors import ConfigError

if TYPE_CHECKING:
    from distnorm.trainer.rundir import Existing

BAD_INPUT = 2


def validate(configs: Sequence[str], overrides: Sequence[str]) -> int:
    """Check configurations."""
    from distnorm.config import load_config

    code = 0
    for config in configs:
        try:
            load_config(config, overrides)
        except ConfigError as error:
            print(error, file=sys.stderr)
            code = BAD_INPUT
        else:
            print(f"{config}: ok")
    return code


def schema() -> int:
    """Print the JSON Schema of a configuration."""
    from distnorm.config import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


def train(config: str, overrides: Sequence[str], existing: Existing) -> int:
    """Run the reference trainer. Collective."""
    from distnorm.config import load_config

    loaded = load_config(config, overrides)
    from distnorm.trainer import run

    return run.main(loaded, existing)


def verify(config: str, overrides: Sequence[str], against: str | None, **options: Any) -> int:
    """Prove the norm of one training step, and its gradients where there is a reference. Collective."""
    from distnorm.config import load_config

    loaded = load_config(config, overrides)
    other = None if against is None else _reference(against, overrides)
    if other is None and any(options.values()):
        raise ConfigError("verify: expected --against with --trace, --json or --page")
    from distnorm.trainer import verify

    return verify.main(loaded, other, **{name: value for name, value in options.items() if value})


def _reference(against: str, overrides: Sequence[str]) -> Any:
    """The configuration of one process, or the folder of a dump."""
    from distnorm.config import load_config

    shared = [text for text in overrides if not text.startswith("train.parallel")]
    return Path(against) if Path(against).is_dir() else load_config(against, shared)


def doctor(
    config: str | None, against: str | None, overrides: Sequence[str], env: bool, **options: Any
) -> int:
    """Compare gradients with those of one process. Collective."""
    if env:
        from distnorm.verification.doctor import environment

        return environment.main()
    if config is None or against is None:
        raise ConfigError("doctor: expected CONFIG and --against, or --env")
    from distnorm.config import load_config

    loaded = load_config(config, overrides)
    other = _reference(against, overrides)
    from distnorm.trainer import doctor

    return doctor.main(loaded, other, **options)


def dump(config: str, output: str, overrides: Sequence[str]) -> int:
    """Write a step's gradients and weights. Collective."""
    from distnorm.config import load_config

    loaded = load_config(config, overrides)
    from distnorm.trainer import doctor

    return doctor.main_dump(loaded, output)


def plan(config: str, overrides: Sequence[str], world: int | None, rank: int, as_json: bool) -> int:
    """Show the plan of one rank of a world that needn't exist."""
    from distnorm.config import load_config
    from distnorm.config.scaling import degrees_of, scaled_to

    loaded = load_config(config, overrides)
    loaded = loaded if world is None else scaled_to(loaded, world)
    ranks = math.prod(degrees_of(loaded).values())
    if not 0 <= rank < ranks:
        raise ConfigError(f"--rank: expected 0 to {ranks - 1}, found {rank}")
    from distnorm.trainer import dry_run
    from distnorm.verification import preview

    return preview.main(loaded, rank, as_json, dry_run.model_of, dry_run.partial_bytes)


def compare(run_a: str, run_b: str, rtol: float | None) -> int:
    """Find the first step at which two runs part."""
    from distnorm.monitor import compare

    return compare.main(run_a, run_b, rtol)


def report(runs: Sequence[str], output: str) -> int:
    """Write a page about runs."""
    from distnorm.monitor.report import command

    return command.main(runs, output)


def watch(runs: Sequence[str], **options: Any) -> int:
    """Follow runs while they train."""
    from distnorm.monitor.watch import command

    return command.main(runs, **options)


def suggest(run: str) -> int:
    """List thresholds with their clip rates."""
    from distnorm.monitor.report import thresholds

    return thresholds.main(run)


def bench(workloads: Sequence[str], **options: Any) -> int:
    """Time functions side by side. Collective."""
    from distnorm.bench import run

    return run.main(workloads, **options)
