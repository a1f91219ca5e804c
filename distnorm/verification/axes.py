"""Which mesh axes are in sight, and which ranks lie along each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from distnorm.verification.pieces import is_dtensor

Lines = Mapping[str, Sequence[tuple[int, ...]]]
"""Mesh axis -> the sets of ranks that differ only by their coordinate on it, in global rank numbers."""


def lines_of(tensors: Iterable[Tensor], pp_mesh: Any = None) -> Lines:
    """Collect the axes of all meshes that this rank's tensors and pipeline stages lie on."""
    meshes = [tensor.device_mesh for tensor in tensors if is_dtensor(tensor)]  # type: ignore[attr-defined]
    lines: dict[str, list[tuple[int, ...]]] = {}
    seen: set[object] = set()
    for mesh in [*meshes, *([] if pp_mesh is None else [pp_mesh])]:
        ranks = mesh.mesh.cpu()
        names = mesh.mesh_dim_names or [
            f"{i} of an unnamed {tuple(ranks.shape)} mesh" for i in range(ranks.ndim)
        ]
        identity = (tuple(names), str(ranks.tolist()))
        if identity in seen:
            continue
        seen.add(identity)
        for axis, name in enumerate(names):
            along = ranks.movedim(axis, -1).reshape(-1, ranks.shape[axis])
            lines.setdefault(name, []).extend(tuple(line) for line in along.tolist())
    return lines


def merge_lines(published: Iterable[Lines], members: Sequence[int]) -> Lines:
    """Put together what all ranks see, and add the group itself where no axis runs through all of it."""
    merged: dict[str, list[tuple[int, ...]]] = {}
    for lines in published:
        for name, found in lines.items():
            known = merged.setdefault(name, [])
            known += [line for line in found if line not in known and set(line) <= set(members)]
    merged = {name: lines for name, lines in merged.items() if lines}
    everyone = set(members)
    if len(everyone) > 1 and not any(set(line) == everyone for lines in merged.values() for line in lines):
        merged[f"world (all {len(everyone)} ranks)"] = [tuple(members)]
    return merged
