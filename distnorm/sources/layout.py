"""How the whole model lies on the ranks, as far as its tensors don't say so themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh

from distnorm.sources.targets import Tied, checked_tied, stage_of


@dataclass(frozen=True, slots=True)
class Layout:
    """What the caller says of names and pieces. It is hashable, and part of the key of a plan.

    Args:
        stage: this rank's pipeline stage, put before every name that is not tied; `None` where names
            are those of the whole model already.
        tied: groups of names that are one parameter.
    """

    stage: int | None = None
    tied: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def of(cls, pp_mesh: DeviceMesh | None = None, tied: Tied = ()) -> Layout:
        """Read what the caller gave.

        Raises:
            ConfigError: it is wrong, by itself.
        """
        return cls(stage_of(pp_mesh), checked_tied(tied))

    @property
    def terms(self) -> Mapping[str, object]:
        """What must be the same on all ranks."""
        return {"tied": self.tied}


UNDECLARED = Layout()
"""Tensors say all of it themselves."""
