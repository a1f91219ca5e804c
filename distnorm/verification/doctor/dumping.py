"""A step's gradients and weights on disk, by `torch.distributed.checkpoint`; and a dump as the reference."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from distnorm.errors import DistnormError, RunError, UnsupportedGradientError
from distnorm.plan.collectives import Ranks
from distnorm.sources import checked_tied, named_tensors, read_once
from distnorm.sources.layout import Layout
from distnorm.sources.targets import canonical_names
from distnorm.verification.doctor.batch import row_digests
from distnorm.verification.doctor.blocks import Block, block_around, is_run, overlap, shape_of
from distnorm.verification.doctor.holdings import FlatRun, Held, Weight, count, read_holdings, select, show
from distnorm.verification.doctor.reference import Blocks, Known
from distnorm.verification.pieces import digest, is_dtensor

_FACTS = "doctor.json"
_FORMAT = 1
_ROUNDINGS = 64.0  # units in the last place: both sides round


def dump(
    target: Any,
    folder: str | Path,
    *,
    group: ProcessGroup | None = None,
    tied: Iterable[Sequence[str]] = (),
    batch: Any = None,
    tolerances: Mapping[str, float] | None = None,
) -> None:
    """Write a step's gradients and weights, as the reference of a later `distnorm.doctor`.

    Collective: every rank of `group` must call it, after a backward and before gradients are clipped. Each
    rank writes its own pieces, by `torch.distributed.checkpoint`; the first also writes which rank holds
    what, and digests of the batch's rows. Gradients that are partial sums are written reduced.

    Args:
        target: as for `distnorm.doctor`, with names of the whole model.
        folder: where; it is made, and must not hold a dump already.
        group: the ranks that hold the model; default: the whole world, or this process alone.
        tied: groups of names that are one parameter.
        batch: what this rank's model was given, a tensor or several, to be compared by its rows.
        tolerances: by name, the relative difference that rounding alone explains, where it is known.

    Raises:
        DistnormError: on every rank: the folder holds a dump, or a gradient can't be written (FSDP1's flat
            pieces are none that a checkpoint knows).
    """
    ranks, path, target = Ranks(group), Path(folder), read_once(target)
    groups = tuple(tuple(names) for names in tied)
    with ranks.together():
        _require_checkpoints()
        if (path / _FACTS).exists():
            raise RunError(f"dump: expected a folder without a dump, found one in {path}")
    with ranks.together():
        held = read_holdings(ranks.rank, target, Layout.of(tied=groups))
        _refuse_flat(held)
        rows = [] if batch is None else row_digests((batch,), {})
    state = _state_of(target, groups)
    facts = [_facts_of(one.holding) for one in held]
    everyone = ranks.gather((rows, facts))
    state_dict_saver.save(
        state, checkpoint_id=str(path), process_group=ranks.group, no_dist=ranks.group is None
    )
    with ranks.together():
        if ranks.rank == 0:
            text = json.dumps(_summary(everyone, dict(tolerances or {})), indent=1)
            (path / _FACTS).write_text(text, encoding="utf-8")


def _require_checkpoints() -> None:
    if "no_dist" not in inspect.signature(state_dict_saver.save).parameters:
        raise RunError(
            "a dump needs a torch whose checkpoints one rank can write or read by itself (no_dist), as 2.9 "
            f"has it; found torch {torch.__version__}"
        )


def _refuse_flat(held: Sequence[Held]) -> None:
    flat = [h.holding.name for h in held if isinstance(h.holding.index, FlatRun) and count(h.holding.index)]
    if flat:
        raise UnsupportedGradientError(
            f"parameter '{flat[0]}': expected pieces that are blocks of its dims, found FSDP1's flat run; "
            "dump a run without FSDP1, as fully_shard or in one process"
        )


def _state_of(target: Any, tied: tuple[tuple[str, ...], ...]) -> dict[str, Tensor]:
    """What this rank writes; DTensors as they are, partial ones reduced. Collective along their axes."""
    named = named_tensors(target)
    names = canonical_names([name for name, _ in named], None, checked_tied(tied))
    state: dict[str, Tensor] = {}
    for name, (_, tensor) in zip(names, named, strict=True):
        state[f"weight/{name}"] = tensor.detach()
        gradient: Any = tensor.grad
        if gradient is not None:
            gradient = gradient.detach()
            if is_dtensor(gradient) and gradient.placements != tensor.placements:  # type: ignore[attr-defined]
                gradient = gradient.redistribute(tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]
            state[f"gradient/{name}"] = gradient
    return state


def _facts_of(holding: Any) -> dict[str, Any]:
    return {
        "name": holding.name,
        "shape": list(holding.global_shape),
        "dtype": str(holding.dtype).removeprefix("torch."),
        "trains": holding.trains,
        "has_gradient": holding.gradient is not None,
        "piece": show(holding.index),
    }


def _summary(everyone: Sequence[tuple[list[str], list[dict[str, Any]]]], moved: dict[str, float]) -> Any:
    parameters: dict[str, dict[str, Any]] = {}
    for rank, (_, facts) in enumerate(everyone):
        for fact in facts:
            known = parameters.setdefault(fact["name"], {**fact, "pieces": {}, "has_gradient": False})
            known["has_gradient"] |= fact["has_gradient"]
            known["pieces"][str(rank)] = fact["piece"]
    for name, fact in parameters.items():
        fact.pop("piece")
        fact["tolerance"] = moved.get(name)
    once = {tuple(rows): None for rows, _ in everyone if rows}
    return {"format": _FORMAT, "rows": [row for rows in once for row in rows], "parameters": parameters}


class Dumped:
    """A dump as the reference: each rank reads the pieces of weights and the blocks of gradients it needs.

    Args:
        folder: where `dump` wrote it.

    Raises:
        RunError: there is no dump that can be read.
    """

    def __init__(self, folder: Path) -> None:
        _require_checkpoints()
        try:
            facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            if facts["format"] != _FORMAT:
                raise RunError(f"{folder}: expected a dump of format {_FORMAT}, found {facts['format']}")
            parameters: dict[str, Any] = facts["parameters"]
            self.rows: list[str] = facts["rows"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{folder}: expected a folder that distnorm.dump wrote, found {error!r}"
            ) from error
        self._folder = folder
        self.notes: list[str] = []
        if any(fact["tolerance"] is None for fact in parameters.values()):
            self.notes.append("tolerances are those of the dtype's roundings: the dump has none of its own")
        self.known = {name: _known(place, fact) for place, (name, fact) in enumerate(parameters.items())}

    def digests(self, pieces: Sequence[Weight]) -> dict[Weight, str | None]:
        """The digests of pieces of the weights; `None` where the dump has no such piece. Local."""
        found: dict[Weight, str | None] = {}
        for piece in pieces:
            known, common = self.known.get(piece.name), None
            if known is not None and piece.global_shape in (known.shape, (prod(known.shape),)):
                around = block_around(piece.index, known.shape)
                common = overlap(piece.index, around, known.shape)
            found[piece] = None
            if known is not None and common is not None:
                (held,) = self._read({("weight/" + piece.name, around): known.dtype}).values()
                found[piece] = digest(select(held, common.in_block).to(piece.dtype).reshape(piece.shape))
        return found

    def blocks(self, wanted: Sequence[tuple[str, Block]]) -> Blocks:
        """Blocks of the gradients. Local."""
        found: Blocks = {}
        for name, theirs in groupby(wanted, key=lambda block: block[0]):
            dtype = self.known[name].gradient
            assert dtype is not None
            each = [block for _, block in theirs]
            # What is stored is read anew for each block that is asked for, so neighbours are one.
            for some in [each] if is_run(each) else [[block] for block in each]:
                around = ((some[0][0][0], some[-1][0][1]), *some[0][1:]) if some[0] else ()
                (held,) = self._read({("gradient/" + name, around): dtype}).values()
                for block in some:
                    first = block[0][0] - around[0][0] if block else 0
                    found[name, block] = held.narrow(0, first, shape_of(block)[0]) if block else held
        return found

    def _read(self, asked: Mapping[tuple[str, Block], torch.dtype]) -> dict[tuple[str, Block], Tensor]:
        found = {
            (key, block): torch.empty(shape_of(block), dtype=dtype, device="cpu")
            for (key, block), dtype in asked.items()
        }
        try:
            state_dict_loader.load(
                {}, checkpoint_id=str(self._folder), planner=_BlockPlanner(found), no_dist=True
            )
        except Exception as error:  # of many kinds, by what is missing
            raise DistnormError(f"{self._folder}: expected a whole dump, found {error!r}") from error
        return found


class _BlockPlanner(DefaultLoadPlanner):
    """Loads blocks of tensors, in place."""

    def __init__(self, blocks: Mapping[tuple[str, Block], Tensor]) -> None:
        super().__init__()
        self._blocks = blocks

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for key, block in self._blocks:
            offsets, sizes = torch.Size([start for start, _ in block]), torch.Size(shape_of(block))
            chunk = ChunkStorageMetadata(offsets=offsets, sizes=sizes)
            stored = self.metadata.state_dict_metadata[key]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(key, stored, [chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        start = tuple(index.offset)
        return next(
            tensor
            for (key, block), tensor in self._blocks.items()
            if key == index.fqn and tuple(low for low, _ in block) == start
        )


def _known(place: int, fact: Mapping[str, Any]) -> Known:
    dtype: torch.dtype = getattr(torch, fact["dtype"])
    moved = fact["tolerance"]
    tolerance = _ROUNDINGS * torch.finfo(dtype).eps if moved is None else float(moved)
    gradient = dtype if fact["has_gradient"] else None
    return Known(tuple(fact["shape"]), dtype, bool(fact["trains"]), place, tolerance, gradient)
