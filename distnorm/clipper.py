"""`GradClipper`: the way in for a training loop of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.distributed.device_mesh import DeviceMesh

from distnorm import graphs, operators
from distnorm.config import Config, load_config
from distnorm.errors import DistnormError
from distnorm.kernels import outside_graphs, refuse_capture
from distnorm.measure.empty_rank import TakeOver
from distnorm.monitor import Monitor
from distnorm.plan.collectives import Ranks
from distnorm.plan.each_rank import EachRank, by_each_rank
from distnorm.plan.stops import Form, Stops
from distnorm.policies.groups import PolicyGroups
from distnorm.policies.results import ClipResult
from distnorm.sources import Inventory, Layout, Sharded, Target, Tied, modules_of, read_once, shards_of
from distnorm.sources.elsewhere import GradOf
from distnorm.sources.shards import GradShard, Source
from distnorm.step import Step


@by_each_rank("clip", "decide", "measure", "note", "rebind", tensors="parameters")
class GradClipper(Joinable):
    """Measures and clips the gradient of one model, held in pieces by many ranks.

    Collective: every rank of `group` must make one, at the same point, with the same `config` and `tied`.
    Under torch's `Join`, pass it along with the DDP module: ``Join([model, clipper])``.

    Args:
        target: a module, a list of modules (pipeline parts), one parameter, or an iterable of parameters
            or of (name, parameter) pairs. Names must be those of the whole model; without names the
            position is the name.
        config: a path to a YAML file, a mapping, a `Config`, or `None` for the defaults (measure only).
        group: the ranks that hold the model; default: the whole world, or this process alone.
        pp_mesh: a 1-d mesh of pipeline stages, where stages use the same names for other parameters:
            every name that is not tied is then prefixed by the stage's coordinate.
        tied: groups of names that are one parameter, such as ``[("tok.weight", "head.weight")]``.
        sharded: plain tensors that are pieces: patterns of names with (dim, group or 1-d mesh), such as
            ``{"*.qkv.weight": (0, tp_group)}``, or a function of name and tensor that returns a `Piece`.
        grad_of: where gradients are, if not in ``grad``: an attribute's name, such as ``"main_grad"``, or a
            function of a parameter that returns its gradient itself, no copy.

    Raises:
        ConfigError: the configuration, or a tied name, is wrong; or a pattern of `clip.groups` doesn't fit.
        DisagreementError: configuration or tied names differ between ranks.
        CoverageError: pieces of a parameter are missing or overlap.
        ReplicaError: shards that claim to be replicas hold other parameter values.
        UnsupportedGradientError: a parameter's local tensor isn't what its placements say.

    Example:
        >>> clipper = distnorm.GradClipper(model, {"clip": {"max_norm": 1.0}})
        >>> loss.backward()
        >>> result = clipper.clip()
        >>> optimizer.step()
    """

    of_ranks: EachRank[GradClipper] | None

    def __init__(
        self,
        target: Target,
        config: str | Path | Mapping[str, Any] | Config | None = None,
        *,
        group: ProcessGroup | None = None,
        pp_mesh: DeviceMesh | None = None,
        tied: Tied = (),
        sharded: Sharded = None,
        grad_of: GradOf = None,
    ) -> None:
        super().__init__()
        ranks = group if isinstance(group, Ranks) else Ranks(group)
        with ranks.together():
            self._layout = Layout.of(pp_mesh, tied, sharded, grad_of)
            self._step = Step(load_config(config), ranks, self._layout)
            self._target = read_once(target)
        self.key_in_graphs, self.grad_place = operators.key_of(self), self._layout.place
        self.refuse_next = self._step.refuse_next
        self._step.plan(self._read_target, modules_of(self._target))

    @graphs.in_graphs(graphs.trace_clip)
    def clip(self) -> ClipResult:
        """Measure this step's gradient and clip it, in place, as the policies decide.

        By the default policy it is scaled so that its norm is the threshold at most. Collective: every rank
        must call it, after the backward pass and before ``optimizer.step()``, whether it has gradients or
        not. Partial DTensor gradients are stored back reduced. Policy value alone measures nothing, and uses
        no collective once it is known which gradients may be partial.

        Returns:
            The norm before clipping, the coefficient and the rest of `ClipResult`, 0-d tensors on the device.
            Where `skipped` is true the optimizer's step must not happen.

        Raises:
            NonFiniteGradientError: the norm is not finite and ``clip.nonfinite`` is ``raise_now``, or
                ``raise`` on the CPU; gradients are as they were. On an accelerator ``raise`` waits for
                nothing: the gradients become zero there, and the next call raises, as it begins, or `flush`,
                `close` or `state_dict`.
            UnsupportedGradientError: a gradient that can't be measured, such as a sparse one.
            ReplicaError: replicas hold different gradients.
            DisagreementError: ranks measure different sets of parameters, or different steps.
            LostRankError: a rank did not come within the process group's timeout.
            DistnormError: a policy uses the loss, and no rank gave one; the process group was destroyed; or
                a CUDA graph is captured that can't hold the step.
        """
        self._begin_step()
        return self._step.take(self._inventory.holders, scales=True).result

    def in_graph(self, given: Mapping[int, Tensor]) -> tuple[Step, Stops[Tensor]]:
        """A step of the local gradients that a graph hands over: what keeps it, and its work."""
        self._inventory.require_current()
        self._begin_step()
        step = self._step.walk(self._inventory.holders, scales=True, given=given)
        return self._step, graphs.numbers_of(step)

    def form_in_graph(self) -> Form | None:
        """What a graph has to know of a step's all-reduce; `None` if it can't issue it."""
        return None if self._join_config.enable else graphs.form_of_step(self._step)

    def keep(self, result: ClipResult) -> None:
        """Let `last` return this result, within a graph."""
        self._step.last = result

    @outside_graphs
    def decide(self) -> ClipResult:
        """Do as `clip` does, but leave the gradients for the caller to multiply by the coefficient.

        Collective, and raises, as `clip`. Partial DTensor gradients are stored back reduced here too. Where
        there are many coefficients, the result doesn't hold them. Where `skipped` is true, don't step.
        """
        self._begin_step()
        return self._step.take(self._inventory.holders, scales=False).result

    @outside_graphs
    def measure(self) -> ClipResult:
        """Measure this step's gradient and change nothing. Collective, and raises, as `clip` does; but where
        that raises only in the next step, this returns the norm, inf or NaN."""
        self._plan_if_changed()
        return self._step.measure(self._inventory.holders)

    @outside_graphs
    def note(self, *, loss: Tensor | float | None = None, tokens: int | None = None, **facts: float) -> None:
        """Give the loss and the tokens of the step that is clipped next. Not collective.

        Args:
            loss: this rank's own, 0-d, or a number; `None` where it has none. Policies take the mean, rows
                have rank 0's. It is kept as it is now; of a step in a CUDA graph it is noted there, a tensor.
            tokens: number of tokens in the whole batch, for the row's tokens a second.
            facts: further numbers for the row, such as ``learning_rate``, which `attach` notes by itself. The
                caller's own ``step`` is not for the row: the ranks compare it, so that all name one which
                left a `clip` out, or called it twice.

        Raises:
            DistnormError: the loss is no single number.
        """
        self._step.note(loss, tokens, facts)

    @property
    def config(self) -> Config:
        """The `Config` in force."""
        return self._step.config

    @property
    def last(self) -> ClipResult | None:
        """What the newest `clip` returned, or `None`."""
        return self._step.last

    @property
    def rules(self) -> PolicyGroups:
        """The policies and their groups."""
        return self._step.groups

    @property
    def may_skip(self) -> bool:
        """Whether a result may say that the optimizer's step must not happen."""
        return self._step.may_skip

    @property
    def parameters(self) -> list[Tensor]:
        """The target's tensors, each once."""
        return list(self._inventory.holders)

    @property
    def monitor(self) -> Monitor | None:
        """What gets a row of every step and gives alerts; `None` if nothing is set under `monitor`."""
        return None if self._step.monitor is None else self._step.monitor.monitor

    @property
    def fingerprints(self) -> dict[int, dict[str, int]]:
        """By step and name, the fingerprints that `monitor.fingerprints` keeps: of the bits that this rank
        counts of each gradient, before clipping. Not collective; waits for the device."""
        return {s: {name: int(n) for name, n in of.items()} for s, of in self._step.fingerprints.items()}

    def flush(self, **facts: Any) -> dict[str, Any] | None:
        """Write the rows of all steps up to now. Not collective.

        A step's row is written one step later, or here, which waits for the device.

        Args:
            facts: further keys for the newest step's row, if it hasn't been written yet.

        Returns:
            That row, as in metrics.jsonl; `None` before the first step, or without a monitor.

        Raises:
            NonFiniteGradientError: of the newest step, or of replays of a CUDA graph, on an accelerator,
                where ``clip.nonfinite`` is ``raise``; the row is written before.
        """
        row = None if self._step.monitor is None else self._step.monitor.flush(facts)
        self._step.deferred.check_alone()
        return row

    def close(self) -> None:
        """Write the rows that are left, close the monitor's files, and remove the hooks of `clip.overlap`.
        Not collective. Raises as `flush`, when all is closed."""
        self._step.close()
        self._step.deferred.check_alone()

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, on any topology: plain numbers, strings and lists.

        Not collective. Waits for the device where there are histories, or a monitor. Raises as `flush`.
        """
        self._step.deferred.check_alone()
        return self._step.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. Not collective, but every rank has to, or none: an error that was still
        to be raised is forgotten. A state of version 1 has no policies: theirs begin anew.

        Raises:
            DistnormError: it is of another version, of other policies or groups; nothing has changed then.
        """
        self._step.load_state_dict(state)

    def rebind(self, group: ProcessGroup | None = None) -> None:
        """Go on with another process group, after the old one was destroyed: histories and step counts stay.

        Collective: every rank of the new group (default: the whole world) must call it, with equal states.

        Raises:
            DistnormError: as the constructor.
        """
        self._step.rebind(Ranks(group))
        self.key_in_graphs = operators.key_of(self)
        self._step.plan(self._read_target, modules_of(self._target))

    def __reduce__(self) -> NoReturn:
        """Refused: process groups and what was planned with them can't be copied."""
        cure = "keep clipper.state_dict(), and make a GradClipper of the copied model"
        raise DistnormError(f"expected a clipper to stay with its model, found a copy or a pickle; {cure}")

    def __repr__(self) -> str:
        return f"GradClipper({len(self._inventory.holders)} tensors, {self._step.describe()})"

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """For `Join`: a rank that is out of data does nothing, and takes over the histories at the end."""
        return TakeOver(self._step.take_over)

    @property
    def join_device(self) -> torch.device:
        """Where `Join` reduces its counters."""
        return self._step.ranks.reduce_device(torch.device("cpu"))

    @property
    def join_process_group(self) -> Any:
        """The group of all ranks that take part."""
        return self._step.ranks.group

    def _read_target(self) -> tuple[list[GradShard], list[tuple[str, Tensor]]]:
        self._inventory = Inventory(self._target)
        named = self._inventory.named
        return shards_of(named, Source.GRADIENT, target=self._target, layout=self._layout), named

    def _begin_step(self) -> None:
        self._step.deferred.check()  # first: all ranks raise here, and only some may have to plan
        self._plan_if_changed()

    def _plan_if_changed(self) -> None:
        self._step.check_group()
        if self._join_config.enable:
            refuse_capture("expected no Join, found one; capture with as many steps on all ranks")
            Join.notify_join_context(self)
            self._step.is_registered_with_join = True
        if not self._step.has_plan or not self._inventory.is_current:
            self._step.plan(self._read_target, modules_of(self._target), anew=True)
