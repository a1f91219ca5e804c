"""How the whole model lies on the ranks, as far as its tensors don't say so themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh

from distnorm.errors import ConfigError
from distnorm.sources.declared import NOTHING, Declared, Sharded
from distnorm.sources.elsewhere import GradOf, GradPlace
from distnorm.sources.targets import Tied, checked_tied, stage_of


@dataclass(frozen=True, slots=True)
class Layout:
    """What the caller says of names, pieces and gradients. It is hashable, and part of the key of a plan.

    Args:
        stage: this rank's pipeline stage, put before every name that is not tied; `None` where names
            are those of the whole model already.
        tied: groups of names that are one parameter.
        declared: plain tensors that are pieces.
        place: where gradients are; `None` where they are in `grad`.
    """

    stage: int | None = None
    tied: tuple[tuple[str, ...], ...] = ()
    declared: Declared = NOTHING
    place: GradPlace | None = None

    @classmethod
    def of(
        cls,
        pp_mesh: DeviceMesh | None = None,
        tied: Tied = (),
        sharded: Sharded = None,
        grad_of: GradOf = None,
    ) -> Layout:
        """Read what the caller gave.

        Raises:
            ConfigError: it is wrong, by itself.
        """
        place = None if grad_of is None else GradPlace(grad_of)
        return cls(stage_of(pp_mesh), checked_tied(tied), Declared.of(sharded), place)

    @property
    def terms(self) -> Mapping[str, object]:
        """What must be the same on all ranks."""
        place = self.place.given if self.place is not None else None
        grad_of = "a function" if callable(place) else place
        return {"tied": self.tied, "sharded": self.declared.term, "grad_of": grad_of}

    def refuse_overlap(self) -> None:
        """Refuse `clip.overlap` of gradients that autograd's hooks don't announce.

        Raises:
            ConfigError: they are elsewhere than in `grad`.
        """
        if self.place is not None:
            raise ConfigError(f"clip.overlap: expected false, as gradients are in {self.place}; found true")


UNDECLARED = Layout()
"""Tensors say all of it themselves."""
