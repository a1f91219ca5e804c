"""One line in a user's script: every step's gradients are measured and clipped, at the right moment."""

from __future__ import annotations

from distnorm.hooks.attaching import Handle, attach

__all__ = ["Handle", "attach"]
