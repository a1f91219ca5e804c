"""One step's payload of single parameters, as a measurement would make and reduce it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distnorm.measure.exchange import Payload
from distnorm.measure.gradients import completed, read_with_care
from distnorm.measure.norms import Norm, norm
from distnorm.measure.partials import agree_on_partials
from distnorm.plan.collectives import Ranks
from distnorm.plan.model_table import ModelTable, make_model_table
from distnorm.plan.plan import Share, make_plan
from distnorm.sources import Layout, shards_of
from distnorm.sources.shards import GradShard, Source
from tests import oracle
from tests.topologies import (
    Held,
    Topology,
    make_meshes,
    make_parameters,
    pp_mesh,
    set_gradients,
    values,
    whole_gradients,
)


@dataclass
class Model:
    """What one rank holds, planned."""

    ranks: Ranks
    norm: Norm
    shards: list[GradShard]
    shares: tuple[Share, ...]
    table: ModelTable
    batches: Any = None

    @classmethod
    def of(cls, named: Sequence[tuple[str, Tensor]], order: float = 2.0, **more: Any) -> Model:
        return cls.of_shards(shards_of(named, Source.GRADIENT, **more), order)

    @classmethod
    def of_shards(cls, shards: list[GradShard], order: float = 2.0) -> Model:
        ranks = Ranks(dist.new_group() if dist.is_initialized() else None)
        by = norm(order)
        shares = make_plan(ranks, shards, {}, replicas_share=by.replicas_share).shares
        return cls(ranks, by, shards, shares, make_model_table(ranks, shards, shares))

    @classmethod
    def of_topology(cls, topology: Topology) -> tuple[Model, list[Any]]:
        held = make_parameters(topology, make_meshes(topology))
        named = [(one.name, parameter) for one, _, parameter in held]
        return cls.of(named, topology.order, layout=Layout.of(pp_mesh(topology), topology.tied)), held

    def gradients(self) -> list[Tensor | None]:
        readings, problems = read_with_care(self.shards)
        assert not problems
        if self.batches is None:  # until some rank has a gradient
            self.batches = agree_on_partials(self.ranks, self.shards, readings)
        for batch in self.batches or ():
            batch.reduce(self.shards, readings, store=False)
        return completed(self.shards, readings, problems, store=False).tensors

    def reduced(
        self, payload: Payload, gradients: Sequence[Tensor | None] | None = None, op: str | None = None
    ) -> Tensor:
        """What all ranks' payloads are reduced to, of gradients that are read here if they aren't given."""
        gradients = self.gradients() if gradients is None else gradients
        local = payload.local(gradients, torch.device("cpu"))
        assert local.shape == (payload.length,)
        return self.ranks.all_reduce_(local, op or self.norm.op)


def steps(topology: Topology, held: list[Any]) -> Any:
    for step in range(topology.steps):
        set_gradients(topology, held, step)
        yield step


# ---- what one process that holds everything would find


def name_of(topology: Topology, held: Held) -> str:
    if held.label == "tied" and topology.tied:
        return topology.tied[0][0]
    return f"pp{held.label.split('.')[0]}.{held.name}" if topology.stages > 1 else held.name


def dense_parameters(topology: Topology, step: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """name -> gradient and weight of the whole parameter, in fp64."""
    gradients = whole_gradients(topology, step)
    return {
        name_of(topology, held): (gradients[held.label], oracle.as_numpy(values(topology, held, -1, ())))
        for held in topology.held
    }
