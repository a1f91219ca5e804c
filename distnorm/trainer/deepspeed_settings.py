"""DeepSpeed's own configuration, made from ours: what stands in the YAML stands nowhere else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distnorm import Config, RunError
from distnorm.trainer.model import parameter_count
from distnorm.trainer.topology import Topology

Settings = Mapping[str, Any]


def engine_settings(config: Config, topology: Topology) -> dict[str, Any]:
    """DeepSpeed's own configuration, made from ours and completed by the file `train.deepspeed.config`.

    Raises:
        RunError: the file can't be read, or says otherwise what is said by the configuration; all such keys.
    """
    train = config.train
    path = train.deepspeed.config
    given = _read_json(Path(path)) if path is not None else {}
    made = _made(config, topology)
    conflicts = [
        f"{key}: expected {json.dumps(ours)}, which {source} says, found {json.dumps(theirs)}"
        for key, ours, theirs, source in _conflicts(made, given)
    ]
    if conflicts:
        raise RunError("\n".join(f"train.deepspeed.config {path}: {text}" for text in conflicts))
    # Buckets default to 5e8 elements, for any size of model.
    defaults = {"zero_optimization": {"reduce_bucket_size": parameter_count(config)}}
    return _merged(_merged(defaults, given), made)


_SOURCES = {
    "gradient_clipping": "clip.max_norm, by which distnorm clips,",
    "zero_optimization": "train.deepspeed",
    "bf16": "train.dtype",
    "fp16": "train.dtype",
    "optimizer": "train.optimizer",
    "scheduler": "train.optimizer, which has a constant lr,",
}


def _made(config: Config, topology: Topology) -> dict[str, Any]:
    train = config.train
    rows = train.data.batch_size // topology.data_degree
    microbatches = (train.parallel.microbatches or 2 * train.parallel.pp) if train.deepspeed.pipeline else 1
    zero: dict[str, Any] = {"stage": train.deepspeed.zero_stage}
    if train.deepspeed.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_batch_size": train.data.batch_size,
        "train_micro_batch_size_per_gpu": rows // microbatches,
        "gradient_accumulation_steps": microbatches,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": train.dtype == "bfloat16"},
        "fp16": {"enabled": False},
        "optimizer": None,
        "scheduler": None,
        # The optimizer is torch's, and steps on the CPU as well.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _conflicts(ours: Settings, theirs: Settings, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    for key, value in theirs.items():
        if key not in ours:
            continue
        if isinstance(ours[key], Mapping) and isinstance(value, Mapping):
            yield from _conflicts(ours[key], value, f"{prefix}{key}.")
        elif ours[key] != value:
            yield (
                prefix + key,
                ours[key],
                value,
                _SOURCES.get((prefix + key).split(".")[0], "the configuration"),
            )


def _merged(below: Settings, above: Settings) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = below.get(key)
        merged[key] = (
            _merged(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
        )
    return {key: value for key, value in merged.items() if value is not None}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"train.deepspeed.config: expected JSON in {path}, found {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"train.deepspeed.config: expected a JSON object in {path}, found {content!r}")
    return content
