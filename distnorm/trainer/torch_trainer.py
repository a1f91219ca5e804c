"""Training on torch's own parallelisms, with a `GradClipper` between backward and step."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from distnorm import ClipResult, GradClipper
from distnorm.trainer.checkpoint import load_checkpoint, save_checkpoint
from distnorm.trainer.engine import Engine
from distnorm.trainer.job import Job
from distnorm.trainer.model import Transformer
from distnorm.trainer.optimizer import make_optimizer
from distnorm.trainer.progress import Part


class TorchTrainer:
    """A `Trainer` of a loop as users write it.

    Args:
        job: what is trained.
        model: the whole model, the same on every rank; what other ranks hold is taken out of it.
    """

    def __init__(self, job: Job, model: Transformer) -> None:
        self.job = job
        self.engine = Engine(job, model)
        self.optimizer = make_optimizer(self.engine.named_parameters().values(), job.config)
        self.clipper = GradClipper([self.engine.module], job.config, tied=self.engine.tied)

    def step(self, step: int) -> tuple[Tensor, ClipResult]:
        self.job.progress.at(step, Part.GRADIENT)
        share = self.compute_gradient(step)
        self.job.progress.at(step, Part.NORM)
        self.clipper.note(step=step)
        return share, self.update(self.engine.loss_of(share))

    def compute_gradient(self, step: int) -> Tensor:
        """Fill the gradients of step `step`, unclipped. Collective.

        Returns:
            This rank's share of the loss, as `Engine.backward` says.
        """
        self.optimizer.zero_grad()
        return self.engine.backward(step)

    def update(self, loss: Tensor | None = None) -> ClipResult:
        """Clip the gradients and apply them. Collective.

        Args:
            loss: of this rank's part of the batch; `None` where it has none.
        """
        self.clipper.note(loss=loss)
        result = self.clipper.clip()
        if not result.skipped:
            self.optimizer.step()
        return result

    def save(self, step: int) -> None:
        save_checkpoint(self.engine, self.optimizer, self.clipper, step)

    def load(self, checkpoint: Path) -> int:
        return load_checkpoint(checkpoint, self.engine, self.optimizer, self.clipper)
