"""What a run is about, whoever computes its gradients: the ranks, their topology, and each one's batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from distnorm import ClipResult, Config, Monitor, RunError
from distnorm.trainer.data import Text
from distnorm.trainer.progress import Progress
from distnorm.trainer.topology import Topology, make_topology
from distnorm.trainer.world import World


@dataclass(frozen=True, slots=True)
class Job:
    """One run's config, and this rank's place in it."""

    config: Config
    world: World
    text: Text
    topology: Topology
    progress: Progress = field(default_factory=lambda: Progress(None))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's slice of step `step`'s global batch, on its device: bytes, and those that follow."""
        topology = self.topology
        inputs, targets = self.text.batch(step, topology.data_index, topology.data_degree)
        return inputs.to(self.world.device), targets.to(self.world.device)


class Clipper(Protocol):
    """What the loop needs of a `GradClipper`, or of what clips an engine's gradients."""

    @property
    def monitor(self) -> Monitor | None:
        """What gets a row of every step."""

    def flush(self, **facts: Any) -> dict[str, Any] | None:
        """Write the rows of all steps up to now."""

    def close(self) -> None:
        """Close the run's files."""


class Trainer(Protocol):
    """Makes a job's steps. Every method is collective."""

    @property
    def job(self) -> Job:
        """What it trains."""

    @property
    def clipper(self) -> Clipper:
        """What clips its gradients."""

    def step(self, step: int) -> tuple[Tensor, ClipResult]:
        """Make step `step`.

        Returns:
            This rank's share of the loss, 0-d fp64: summed over all ranks it is the mean over all tokens;
            and what was measured and clipped.
        """

    def save(self, step: int) -> None:
        """Write the checkpoint of step `step`, which has just been made."""

    def load(self, checkpoint: Path) -> int:
        """Go on from a checkpoint; returns the step after which it was saved."""


def make_job(config: Config, world: World) -> Job:
    """Read the text and lay the mesh over the ranks. Collective.

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
    return Job(config, world, text, make_topology(config, world), Progress(config.train.timeout))
