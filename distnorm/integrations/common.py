"""What every adapter needs: state that may arrive early, and what a framework's logger gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from distnorm.config import Config
from distnorm.monitor.monitor import Monitor, take_layers
from distnorm.policies.results import ClipResult


def missing(framework: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error of an adapter whose framework can't be imported, with the cure."""
    return ModuleNotFoundError(
        f"expected {framework} beside distnorm, found: {error}; pip install 'distnorm[{framework}]'",
        name=error.name,
    )


class Stateful(Protocol):
    """A clipper of any kind."""

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""


class Clipper(Stateful, Protocol):
    """A clipper, as far as logging needs it."""

    @property
    def config(self) -> Config:
        """The configuration in force."""

    @property
    def last(self) -> ClipResult | None:
        """The newest result."""

    @property
    def monitor(self) -> Monitor | None:
        """What gets the rows."""

    def flush(self) -> object:
        """Report all steps up to now."""


class LateState:
    """The state of a clipper that may not exist yet, for a checkpoint restored before training begins.

    It has the two methods that frameworks ask of what they save. Not collective.

    Example:
        >>> state = LateState()
        >>> state.load_state_dict(checkpoint["distnorm"])  # the clipper does not exist yet: kept
        >>> state.bind(handle.clipper)  # loaded now
    """

    def __init__(self) -> None:
        self._clipper: Stateful | None = None
        self._early: dict[str, Any] = {}

    @property
    def clipper(self) -> Stateful | None:
        """The clipper, once there is one."""
        return self._clipper

    def bind(self, clipper: Stateful | None) -> None:
        """Stand for this clipper from now on, and load what has arrived before it. Given `None`, keep the
        state of the one before, for the next.

        Raises:
            DistnormError: the state is none of such a clipper; it is kept.
        """
        if clipper is None and self._clipper is not None:
            self._early = self._clipper.state_dict()
        elif clipper is not None and self._early:
            clipper.load_state_dict(self._early)
            self._early = {}
        self._clipper = clipper

    def state_dict(self) -> dict[str, Any]:
        """The clipper's state; before there is one, what has arrived; empty if nothing has."""
        return dict(self._early) if self._clipper is None else self._clipper.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state, or keep it until there is a clipper. An empty one changes nothing: a run without a
        clipper has saved it.

        Raises:
            DistnormError: the clipper refuses it.
        """
        if not state:
            return
        if self._clipper is None:
            self._early = dict(state)
        else:
            self._clipper.load_state_dict(state)


def log_values(clipper: Clipper) -> dict[str, Tensor | float]:
    """What a framework logs of the newest step. Not collective; to be called only when something is logged.

    Args:
        clipper: of any kind, such as ``handle.clipper``.

    Returns:
        0-d fp32 tensors on the gradients' device, which nothing has read: ``grad_norm`` (before clipping),
        ``grad_norm_clipped``, ``clip_coef``, ``clip_threshold`` (inf where none is) and ``skipped`` (0 or 1).
        Where `monitor.every` is set, also floats ``grad_norm/<layer>`` of the newest monitored step that no
        call before has returned; only then the device is waited for. Nothing before the first step.

    Raises:
        NonFiniteGradientError: as `GradClipper.flush`, where layers are monitored.
    """
    result = clipper.last
    if result is None:
        return {}
    values: dict[str, Tensor | float] = {
        "grad_norm": result.total_norm.to(torch.float32),
        "grad_norm_clipped": result.clipped_norm.to(torch.float32),
        "clip_coef": result.clip_coef.to(torch.float32),
        "clip_threshold": result.threshold.to(torch.float32),
        "skipped": result.skipped.to(torch.float32),
    }
    if clipper.monitor is not None and clipper.config.monitor.every is not None:
        clipper.flush()
        values |= {f"grad_norm/{row.layer}": row.norm for row in take_layers(clipper.monitor)}
    return values
