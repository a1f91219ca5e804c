"""Training on torch's own parallelisms, with a `GradClipper` between backward and step."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from distnorm import ClipResult, GradClipper, NonFiniteGradientError
from distnorm.trainer.checkpoint import load_checkpoint, save_checkpoint
from distnorm.trainer.engine import Engine
from distnorm.trainer.job import Job
from distnorm.trainer.model import Transformer
from distnorm.trainer.optimizer import make_optimizer
from distnorm.trainer.progress import Part
from distnorm.trainer.replaying import Replays


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
        self.replays: Replays | None = None
        if job.config.monitor.fingerprints is not None:
            factor, folder = job.config.monitor.alerts.exploding, job.config.train.output_dir
            self.replays = Replays(job.world, self.clipper, factor, folder)

    def step(self, step: int) -> tuple[Tensor, ClipResult]:
        self.job.progress.at(step, Part.GRADIENT)
        share = self.compute_gradient(step)
        self.job.progress.at(step, Part.NORM)
        self.clipper.note(loss=self.engine.loss_of(share), step=step)
        try:
            result = self.clipper.clip()
        except NonFiniteGradientError:
            self._replay(step, float("nan"))
            raise
        if self.replays is not None:
            self._replay(step, float(result.total_norm))
        self._apply(result)
        return share, result

    def _replay(self, step: int, norm: float) -> None:
        """Compute a suspicious step again, before its optimizer's step. Collective."""
        if self.replays is not None:
            self.replays.after(step, norm, lambda: self.engine.backward(step))

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
        self._apply(result)
        return result

    def _apply(self, result: ClipResult) -> None:
        if not result.skipped:
            self.optimizer.step()

    def save(self, step: int) -> None:
        save_checkpoint(self.engine, self.optimizer, self.clipper, step)

    def load(self, checkpoint: Path) -> int:
        return load_checkpoint(checkpoint, self.engine, self.optimizer, self.clipper)
