"""What all members of a process group know alike, so that they enter the same collectives."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

_MOST_PLANS = 32  # for each group


@dataclass
class Forms:
    """What graphs are guarded by that know the form of a group's vector.

    Args:
        version: another one whenever the form of some group changes.
    """

    version: str = "0"  # a number would become a variable of the graph

    def change(self) -> None:
        """Have such graphs traced again."""
        self.version = str(int(self.version) + 1)


FORMS = Forms()


@dataclass
class GroupState:
    """State of a process group that is equal on all its members, since they make every plan together.

    Args:
        device_type: where vectors are reduced; `None` before the first plan.
        is_packed: whether a consensus header is one number in the all-reduced vector.
        has_replicas: whether some plan has replicas, which are compared whole in the first step.
        compares_replicas: whether the vector has an element by which replicas are compared.
        plans: of lists of tensors, by what was planned. Its size is bounded for each group apart: every
            member makes the same calls on a group, so all of them evict the same plan.
    """

    device_type: str | None = None
    is_packed: bool = True
    has_replicas: bool = False
    compares_replicas: bool = False
    plans: OrderedDict[object, Any] = field(default_factory=OrderedDict)

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("is_packed", "compares_replicas") and value != getattr(self, name, None):
            FORMS.change()
        object.__setattr__(self, name, value)

    def recall(self, key: object) -> Any:
        """What was planned under a key; `None` if that is not known, or no longer."""
        if key in self.plans:
            self.plans.move_to_end(key)
        return self.plans.get(key)

    def remember(self, key: object, planned: object) -> None:
        """Keep what was planned, in place of what was used least lately."""
        self.plans[key] = planned
        if len(self.plans) > _MOST_PLANS:
            self.plans.popitem(last=False)
