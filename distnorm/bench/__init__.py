"""`distnorm bench`: gradient-norm functions side by side, and beside what the machine can do.

This file imports nothing, so the command line can tell the workloads' names without torch.
"""

from __future__ import annotations

WORKLOADS = ("many", "moe", "ddp", "fsdp", "large", "clip-step", "fingerprints")
"""In the order in which they run."""

ROUNDS = 15
"""How often each contender is timed by default."""
