"""A step's gradients and weights on disk, by `torch.distributed.checkpoint`; and a dump as the reference."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

from distnorm.errors import DistnormError, RunError, UnsupportedGradientError
from distnorm.plan.collectives import Ranks
from distnorm.sources import checked_tied, named_tensors, read_once
from distnorm.sources.layout import Layout
from distnorm.sources.targets import canonical_names
from distnorm.verification.doctor.batch import row_digests
from distnorm.verification.doctor.holdings import FlatRun, Held, read_holdings, show
from distnorm.verification.doctor.reference import Expected, Known, Reference
from distnorm.verification.pieces import is_dtensor

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


def _refuse_flat(held: Sequence[Held]) -> None:
    flat = [h.holding.name for h in held if isinstance(h.holding.index, FlatRun) and h.holding.weight]
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


class Dumped(Reference):
    """A dump as the reference: each rank reads the parameters that it judges.

    Args:
        folder: where `dump` wrote it.

    Raises:
        RunError: there is no dump that can be read.
    """

    def __init__(self, folder: Path) -> None:
        try:
            facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            if facts["format"] != _FORMAT:
                raise RunError(f"{folder}: expected a dump of format {_FORMAT}, found {facts['format']}")
            self._facts: dict[str, Any] = facts["parameters"]
            self.rows: list[str] = facts["rows"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{folder}: expected a folder that distnorm.dump wrote, found {error!r}"
            ) from error
        self._folder = folder
        self.notes: list[str] = []
        if any(fact["tolerance"] is None for fact in self._facts.values()):
            self.notes.append("tolerances are those of the dtype's roundings: the dump has none of its own")
        self.known = {name: _known(place, fact) for place, (name, fact) in enumerate(self._facts.items())}

    def fetch(self, ranks: Ranks, names: Sequence[str]) -> dict[str, Expected]:
        state: dict[str, Tensor] = {}
        for name in names:
            if name in self.known:
                known = self.known[name]
                state[f"weight/{name}"] = torch.empty(known.shape, dtype=known.dtype, device="cpu")
                if self._facts[name]["has_gradient"]:
                    state[f"gradient/{name}"] = torch.empty(known.shape, dtype=known.dtype, device="cpu")
        with ranks.together():
            try:
                if state:
                    state_dict_loader.load(state, checkpoint_id=str(self._folder), no_dist=True)
            except Exception as error:  # of many kinds, by what is missing
                raise DistnormError(f"{self._folder}: expected a whole dump, found {error!r}") from error
        return {
            name: Expected(state[f"weight/{name}"], state.get(f"gradient/{name}"))
            for name in names
            if name in self.known
        }


def _known(place: int, fact: Mapping[str, Any]) -> Known:
    dtype: torch.dtype = getattr(torch, fact["dtype"])
    moved = fact["tolerance"]
    tolerance = _ROUNDINGS * torch.finfo(dtype).eps if moved is None else float(moved)
    return Known(tuple(fact["shape"]), dtype, bool(fact["trains"]), place, tolerance)
