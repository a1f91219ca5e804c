"""torchtitan: its `clip_grad_norm_`, and a hook for its `Trainer`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distnorm import functional
from distnorm.clipper import GradClipper
from distnorm.errors import ConfigError
from distnorm.hooks.second_clipper import refuse_other_clippers
from distnorm.integrations.common import log_values, missing
from distnorm.integrations.taking_over import ConfigSource, taken_over
from distnorm.policies.results import ClipResult
from distnorm.sources import Tied

try:
    from torchtitan.distributed import utils as dist_utils
except ModuleNotFoundError as error:
    raise missing("torchtitan", error) from error

_STATE = "distnorm"


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    pp_mesh: DeviceMesh | None = None,
    ep_enabled: bool = False,
) -> Tensor:
    """Do as `torchtitan.distributed.utils.clip_grad_norm_`, whose place it takes, on every layout.

    Collective: every rank of the world must call it. DTensors on any mixture of meshes and plain tensors are
    taken, with experts and without.

    Args:
        parameters: one tensor, or all of this rank's, in the order of its model parts.
        max_norm: the threshold.
        norm_type: the p of the norm, or inf.
        error_if_nonfinite: whether a norm that is inf or NaN is an error; then the value is read.
        foreach: accepted, and without a meaning.
        pp_mesh: the mesh of pipeline stages, if there are any: parameters are named by their position there.
        ep_enabled: accepted, and without a meaning: the plan finds out who holds which expert.

    Returns:
        0-d fp32, the norm before clipping, the same bits on every rank.

    Raises:
        DistnormError: as `distnorm.clip_grad_norm_`.
    """
    return functional.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach, pp_mesh)


class TrainerClipper:
    """Clips a torchtitan `Trainer`'s steps; what `attach_trainer` returns.

    Args:
        trainer: a `torchtitan.trainer.Trainer`, or one derived from it.
        config: as for `GradClipper`.
        tied: as for `GradClipper`.

    Attributes:
        clipper: the `GradClipper`, whose state the trainer's checkpoints keep.
    """

    def __init__(self, trainer: Any, config: ConfigSource = None, *, tied: Tied = ()) -> None:
        self._limit = trainer.config.training.max_norm
        refuse_other_clippers(list(trainer.optimizers))
        taken = taken_over(config, self._limit, "training.max_norm")
        # Pipeline parts keep the whole model's names, so no stage has to be put before them.
        self.clipper = GradClipper(trainer.model_parts, taken, tied=tied)

    @property
    def last(self) -> ClipResult | None:
        """The newest result, or `None` before the first step."""
        return self.clipper.last

    @property
    def skips(self) -> bool:
        """Whether no optimizer may step now; waits for the device only where a policy may say so."""
        last = self.clipper.last
        return self.clipper.rules.may_skip and last is not None and bool(last.skipped)

    def clip(
        self,
        parameters: Tensor | Iterable[Tensor],
        max_norm: float,
        norm_type: float = 2.0,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        """Clip the trainer's step, in the place of torchtitan's function; `config` decides. Collective.

        Raises:
            ConfigError: an argument is not what was taken over.
            DistnormError: as `GradClipper.clip`.
        """
        own = self.clipper.config.norm.type
        if max_norm != self._limit:
            raise ConfigError(
                f"training.max_norm: expected {self._limit}, as the hook was set, found {max_norm}"
            )
        if norm_type not in (own, 2.0):
            raise ConfigError(f"norm_type: expected {own} as norm.type says, found {norm_type}")
        return self.clipper.clip().total_norm.to(torch.float32)


def attach_trainer(trainer: Any, config: ConfigSource = None, *, tied: Tied = ()) -> TrainerClipper:
    """Have a torchtitan `Trainer` measure, clip and log by distnorm, and its checkpoints keep the histories.

    Collective: every rank must call it, between the Trainer's construction and ``train()``. The gradient is
    that of all model parts on all stages. ``training.max_norm``, whose default is 1.0, becomes
    `clip.max_norm` where the configuration has none, and is refused where both are set and differ; inf leaves
    the limit to the configuration. Where the step must not happen (`clip.nonfinite: skip`, policy
    skip_spikes), no optimizer steps. On steps that the Trainer logs, ``grad_norm_clipped``, ``clip_coef``,
    ``clip_threshold``, ``skipped`` and, where `monitor.every` is set, the layers' norms are logged beside its
    own ``grad_norm``, which is distnorm's; other steps wait for nothing. Steps by which torchtitan makes an
    optimizer's state are not clipped, and don't count.

    Args:
        trainer: a `torchtitan.trainer.Trainer`, or one derived from it.
        config: as for `GradClipper`.
        tied: as for `GradClipper`.

    Returns:
        What clips: its `last` is the newest `ClipResult`. In the checkpoint it is called ``distnorm``; a
        checkpoint of a run without needs ``checkpoint.exclude_from_loading = ["distnorm"]``.

    Raises:
        ConfigError: the configuration is wrong, or ``training.max_norm`` is another limit.
        DistnormError: as `GradClipper`.

    Example:
        >>> trainer = config.build()
        >>> attach_trainer(trainer, {"clip": {"nonfinite": "skip"}})
        >>> trainer.train()
    """
    clipping = TrainerClipper(trainer, config, tied=tied)
    _put_in_place(trainer, clipping)
    if (states := getattr(trainer.checkpointer, "states", None)) is not None:
        states[_STATE] = clipping.clipper
    return clipping


def _put_in_place(trainer: Any, clipping: TrainerClipper) -> None:
    train_step, step, log = trainer.train_step, trainer.optimizers.step, trainer.metrics_processor.log

    def clipped_train_step(*args: Any, **kwargs: Any) -> Any:
        theirs, dist_utils.clip_grad_norm_ = dist_utils.clip_grad_norm_, clipping.clip
        try:
            return train_step(*args, **kwargs)
        finally:
            dist_utils.clip_grad_norm_ = theirs

    def step_unless_skipped(*args: Any, **kwargs: Any) -> Any:
        return None if clipping.skips else step(*args, **kwargs)

    def log_more(
        step: int, average: float, largest: float, grad_norm: float, extra_metrics: Any = None
    ) -> Any:
        found = {name: float(value) for name, value in log_values(clipping.clipper).items()}
        del found["grad_norm"]  # the trainer's own, which is the same
        return log(step, average, largest, grad_norm, extra_metrics={**(extra_metrics or {}), **found})

    trainer.train_step, trainer.optimizers.step = clipped_train_step, step_unless_skipped
    trainer.metrics_processor.log = log_more
