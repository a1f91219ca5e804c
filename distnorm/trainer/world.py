"""This process among the others: the process group, the device, and errors that all ranks raise together."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from distnorm import Config, DistnormError, LostRankError, RunError
from distnorm.trainer.progress import Part, Progress

T = TypeVar("T")


_LET_GO = 0.05  # seconds
_SHOWN = 8
# Where a node keeps its files, and what is written.
_OF_A_NODE = ("train.output_dir", "train.data.path", "train.device", "train.checkpoint.resume", "monitor.")


@dataclass(frozen=True, slots=True)
class World:
    """Rank, number of ranks and device of this process. Without a process group it is one rank of one."""

    rank: int
    size: int
    device: torch.device

    def together(self, what: str, action: Callable[[], T]) -> T:
        """Run what may fail on some ranks only, and raise what any of them raised on all. Collective.

        Args:
            what: the config's key or the file that a failure of the system is about.
            action: what to run; its `DistnormError` or `OSError` becomes a `RunError`.

        Returns:
            What the action returned on this rank.

        Raises:
            RunError: the action failed on some rank; the text says where.
        """
        failure: Exception | None = None
        message: str | None = None
        try:
            result = action()
        except DistnormError as error:
            failure, message = error, str(error)
        except OSError as error:
            failure, message = error, f"{what}: {error}"
        failed = [(rank, text) for rank, text in enumerate(self.gather(message)) if text is not None]
        if failed:
            raise RunError(_on_ranks(failed, self.size)) from failure
        return result

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in rank order. Collective."""
        if not dist.is_initialized():
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""
        self.gather(None)

    def synchronize(self) -> None:
        """Wait for the device, so that a clock can be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _on_ranks(failed: list[tuple[int, str]], size: int) -> str:
    """One text for all ranks: each message once, with its ranks where they aren't all."""
    ranks_of: dict[str, list[int]] = {}
    for rank, message in failed:
        ranks_of.setdefault(message, []).append(rank)
    return "\n".join(
        message if len(ranks) == size else f"rank {', '.join(map(str, ranks))}: {message}"
        for message, ranks in ranks_of.items()
    )


@contextmanager
def open_world(config: Config) -> Iterator[World]:
    """Join the process group that torchrun describes, and leave it at the end.

    A process group that is there already is used and left alone; without torchrun there is none, and the
    world is this process. The degrees are checked first, by every rank alike, so none waits for another.

    Raises:
        RunError: the degrees don't multiply to the number of ranks, the device isn't there, or the configs
            differ.
    """
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    _check_degrees(config, size)
    device = _device(config.train.device)
    ours = "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if ours:
        _make_group(device, size, config.train.timeout)
    try:
        world = World(dist.get_rank() if dist.is_initialized() else 0, size, device)
        with (progress := Progress(config.train.timeout)).naming():
            progress.at(0, Part.START)
            _check_configs(config, world)
        yield world
    finally:
        if ours and dist.is_initialized():
            # gloo's threads need the interpreter's lock to let go of tensors; at its end they would abort.
            time.sleep(_LET_GO)
            dist.destroy_process_group()


def _make_group(device: torch.device, size: int, timeout: int | None) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    began = time.monotonic()
    try:
        dist.init_process_group(backend, timeout=None if timeout is None else timedelta(seconds=timeout))
    except RuntimeError as error:
        if timeout is None:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise LostRankError(
            f"expected {size} ranks to make a process group, found that not all came; this one waited "
            f"{time.monotonic() - began:.0f} s, train.timeout is {timeout} s ({reason})"
        ) from error


def _check_configs(config: Config, world: World) -> None:
    """Refuse to train with other settings on each rank: another seed, for one, shows in no error."""
    mine = {key: value for key, value in _flat(config.model_dump()) if not key.startswith(_OF_A_NODE)}
    if len(set(world.gather(blake2b(repr(mine).encode()).digest()))) == 1:
        return
    each = world.gather(mine)
    for key in dict.fromkeys(key for one in each for key in one):
        ranks_of: dict[str, list[int]] = {}
        for rank, one in enumerate(each):
            ranks_of.setdefault(str(one.get(key)), []).append(rank)
        if len(ranks_of) > 1:
            found = "; ".join(f"{value} on {_named(ranks)}" for value, ranks in ranks_of.items())
            raise RunError(f"{key}: expected the same on every rank, found {found}")


def _named(ranks: list[int]) -> str:
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks[:_SHOWN])) + more


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", repr(value)


def _check_degrees(config: Config, size: int) -> None:
    parallel = config.train.parallel
    names = ("dp_replicate", "dp_shard", "tp", "pp")
    degrees = [int(getattr(parallel, name)) for name in names]
    expected = math.prod(degrees)
    if expected != size:
        product = " x ".join(f"{name} {degree}" for name, degree in zip(names, degrees, strict=True))
        raise RunError(
            f"train.parallel: expected {expected} ranks ({product}), found {size}; "
            f"start it with torchrun --nproc-per-node {expected}, or change the degrees"
        )


def _device(name: str) -> torch.device:
    """The device of this rank; `auto` takes CUDA where every local rank can have a GPU of its own."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if name == "cpu" or (name == "auto" and found < max(local_ranks, 1)):
        return torch.device("cpu")
    if found < local_ranks:
        raise RunError(
            f"train.device: expected a CUDA device for each of {local_ranks} local ranks, found {found}"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
