"""When a rule's finding becomes an alert: once, until the value was better for a while."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Key = tuple[str, str]


class Latch:
    """Hysteresis and cool-down. A key is an alert's kind, and the layer or "".

    Args:
        cooldown: steps between two alerts of one key.
    """

    def __init__(self, cooldown: int) -> None:
        self._cooldown = cooldown
        self._fired: set[Key] = set()
        self._last: dict[Key, int] = {}

    def fires(self, key: Key, step: int, *, beyond: bool, back: bool) -> bool:
        """Whether an alert is due.

        Args:
            key: what is judged.
            step: when.
            beyond: the value is beyond its bound.
            back: the value is within it by a margin: from here on there can be an alert again.
        """
        if back:
            self._fired.discard(key)
        if not beyond or key in self._fired or 0 <= step - self._last.get(key, step + 1) < self._cooldown:
            return False
        self._fired.add(key)
        self._last[key] = step
        return True

    def release(self, kind: str) -> None:
        """Let all keys of a kind give alerts again."""
        self._fired = {key for key in self._fired if key[0] != kind}

    def state_dict(self) -> dict[str, Any]:
        return {
            "fired": sorted(map(list, self._fired)),
            "last": [[*key, step] for key, step in sorted(self._last.items())],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._fired = {(kind, layer) for kind, layer in state["fired"]}
        self._last = {(kind, layer): step for kind, layer, step in state["last"]}
