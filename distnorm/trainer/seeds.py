"""Random numbers that depend on the config's seed and their use alone."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, use: str) -> torch.Generator:
    """A CPU generator for one use of a seed, such as "weights" or "step 7".

    torch's own reads only the low 32 bits of what it is seeded with, so the two are hashed into them.
    """
    digest = hashlib.blake2b(f"{seed} {use}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
