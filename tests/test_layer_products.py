"""Norms of weights and updates, cosines, and slices, on every kind of sharding, against dense fp64."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import distnorm
from distnorm.monitor.report.layer_charts import layer_charts
from distnorm.monitor.report.layers import read_layers
from tests.counting import as_on_an_accelerator, collectives_and_reads
from tests.refusals import heard

R = Replicate()
# The matrices are so large that a few vectors don't span them.
SHAPES = {"tok": (24, 16), "w": (6, 4), "norm": (5,), "experts": (4, 3, 2), "idle": (3, 3), "frozen": (2, 2)}
GRID: dict[str, list[Any]] = {
    "fsdp2 x tp": [[_StridedShard(0, split_factor=2), Shard(0)], [Shard(0), Shard(1)], [Shard(0), R],
                   [Shard(1), Shard(0)], [Shard(0), R], [R, Shard(0)]],
    "hsdp": [[R, Shard(0)]] * 6,
    "ep": [[Shard(0), R], [R, Shard(1)], None, [Shard(0), Shard(1)], None, None],
    "pp x fsdp2": [[Shard(0)], [Shard(0)], [Shard(0)], [Shard(0)], None, None],
}  # fmt: skip
STAGES = {"tok": (0, 1), "w": (0, 1), "norm": (2, 3), "experts": (2, 3)}
MONITOR: dict[str, Any] = {
    "cosines": True,
    "updates": True,
    "slices": [{"params": ["exp*"]}, {"params": ["w"], "dim": 1, "size": 2}],
    "spectral": ["tok", "w"],
    "spectral_vectors": 3,
}
STEPS, EVERY = 5, 2


def whole(name: str, step: int) -> Tensor:
    """The whole gradient; step 0 is the parameter itself."""
    generator = torch.Generator().manual_seed(100 * list(SHAPES).index(name) + step)
    return torch.randn(SHAPES[name], dtype=torch.float64, generator=generator) * (2.0 if step == 3 else 1.0)


def parameters(topology: str) -> dict[str, nn.Parameter]:
    """What this rank holds."""
    made, mesh = {}, None
    if topology == "pp x fsdp2":
        meshes = {ranks: DeviceMesh("cpu", list(ranks)) for ranks in ((0, 1), (2, 3))}
    elif topology != "single":
        mesh = init_device_mesh("cpu", (2, 2))
    for i, name in enumerate(SHAPES):
        tensor, placements = whole(name, 0), None if topology == "single" else GRID[topology][i]
        if topology == "pp x fsdp2" and placements is not None:
            if dist.get_rank() not in STAGES[name]:
                continue
            mesh = meshes[STAGES[name]]
        if placements is not None:
            tensor = distribute_tensor(tensor, mesh, placements, src_data_rank=None)
        made[name] = nn.Parameter(tensor, requires_grad=name != "frozen")
    return made


def set_gradients(made: Mapping[str, nn.Parameter], step: int) -> None:
    for name, parameter in made.items():
        if name in ("idle", "frozen"):
            continue
        gradient = whole(name, step)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            gradient = distribute_tensor(gradient, mesh, placements, src_data_rank=None)
        parameter.grad = gradient


def train(topology: str, folder: Path, every: int = EVERY) -> tuple[list[Any], list[Any]]:
    """What each clip cost, and the rows that were written."""
    made, costs = parameters(topology), []
    optimizer = torch.optim.AdamW(made.values(), lr=0.1, weight_decay=0.2)
    settings = {"clip": {"max_norm": 1.0}, "monitor": {"every": every, "dir": folder / topology, **MONITOR}}
    clipper = distnorm.GradClipper(made, settings)
    for step in range(1, STEPS + 1):
        set_gradients(made, step)
        clipper.note(loss=torch.tensor(math.inf if step == 4 and _is_last() else 1.0))
        costs.append(collectives_and_reads(clipper.clip))
        optimizer.step()
    clipper.close()
    rows = [read(folder / topology / name) for name in ("layers.jsonl", "metrics.jsonl")]
    return costs, rows


def _is_last() -> bool:
    return not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train_all(folder: Path) -> list[Any]:
    found = []
    for topology in GRID:
        with as_on_an_accelerator():
            found.append(train(topology, folder))
    return found


# ---- spectral norms


def settle(topology: str, folder: Path) -> Any:
    """The rows of a longer run whose weights hardly change."""
    made = parameters(topology)
    monitor = {"every": 1, "dir": folder / topology, "spectral": ["*o*", "w", "idle"], "spectral_vectors": 3}
    clipper = distnorm.GradClipper(made, {"monitor": monitor})
    set_gradients(made, 1)
    for _ in range(SETTLED):
        clipper.clip()
        with torch.no_grad():
            for parameter in made.values():
                parameter *= 1.001
    clipper.close()
    return read(folder / topology / "layers.jsonl")


def settle_all(folder: Path) -> list[Any]:
    return [settle(topology, folder) for topology in GRID]


SETTLED = 18


@pytest.mark.slow
def test_spectral_norms_come_close_to_those_of_an_svd(ranks: Any, tmp_path: Path) -> None:
    found = ranks(4, settle_all, tmp_path, timeout=300)[0]
    alone = settle("single", tmp_path)
    exact = {name: np.linalg.svd(whole(name, 0).numpy(), compute_uv=False) for name in ("tok", "w", "idle")}
    others = {(row["step"], row["layer"]): row for row in alone}
    for rows in (*found, alone):
        assert len(rows) == len(alone)
        for row in rows:
            if row["layer"] not in exact:
                assert "spectral_norm" not in row
                continue
            values = exact[row["layer"]] * 1.001 ** (row["step"] - 1)
            other = others[row["step"], row["layer"]]
            assert row["spectral_norm"] == pytest.approx(other["spectral_norm"], rel=1e-9)
            assert row["spectral_norm"] <= values[0] * (1 + 1e-12)
            if row["step"] > SETTLED - 3:
                assert row["spectral_norm"] == pytest.approx(values[0], rel=1e-3)
                assert row["stable_rank"] == pytest.approx(
                    float((values**2).sum()) / values[0] ** 2, rel=2e-3
                )
    assert alone[0]["spectral_norm"] < exact["tok"][0] * 0.95, "the first is no estimate yet"


def test_matrices_of_zeros_and_nan_have_no_spectral_norm_and_come_back(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.zeros(5, 4))
    monitor = {"every": 1, "dir": tmp_path, "spectral": ["w"], "spectral_vectors": 2}
    clipper = distnorm.GradClipper([("w", weight)], {"monitor": monitor})
    for value in (0.0, math.nan, 2.0, 2.0):
        weight.grad = torch.ones_like(weight)
        with torch.no_grad():
            weight.fill_(value)
        clipper.clip()
    clipper.close()
    found = [row.get("spectral_norm") for row in read(tmp_path / "layers.jsonl")]
    assert found[:2] == [None, None] and found[3] == pytest.approx(2 * math.sqrt(20))


# ---- dense


def dense_run() -> list[dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """For each step the gradient, the weight and the newest update of each parameter."""
    weights = {name: nn.Parameter(whole(name, 0), requires_grad=name != "frozen") for name in SHAPES}
    optimizer = torch.optim.AdamW(weights.values(), lr=0.1, weight_decay=0.2)
    before, steps = {name: w.detach().clone() for name, w in weights.items()}, []
    for step in range(1, STEPS + 1):
        set_gradients(weights, step)
        nothing = {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}
        grads = {name: w.grad.clone() if w.grad is not None else nothing[name] for name, w in weights.items()}
        steps.append(
            {
                name: (grads[name].numpy(), w.detach().numpy().copy(), (w.detach() - before[name]).numpy())
                for name, w in weights.items()
            }
        )
        before = {name: w.detach().clone() for name, w in weights.items()}
        total = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        for w in weights.values():
            if w.grad is not None:
                w.grad *= min(1.0, 1.0 / (total + 1e-6))
        optimizer.step()
    return steps


def expected(g: np.ndarray, w: np.ndarray, u: np.ndarray) -> dict[str, float | None]:
    norms = [math.sqrt(float((x * x).sum())) for x in (g, w, u)]
    inner = {"weight": float((g * w).sum()), "update": float((g * u).sum())}
    cos_weight = inner["weight"] / (norms[0] * norms[1]) if norms[0] * norms[1] else None
    return {
        "weight_norm": norms[1],
        "cos_weight": cos_weight,
        "radial_share": None if cos_weight is None else cos_weight**2,
        "update_norm": norms[2],
        "update_to_weight": norms[2] / norms[1] if norms[1] else None,
        "cos_update": inner["update"] / (norms[0] * norms[2]) if norms[0] * norms[2] else None,
    }


SLICES = {
    **{f"experts[{i}]": ("experts", lambda x, i=i: x[i]) for i in range(4)},
    **{f"w[:, {i}:{i + 2}]": ("w", lambda x, i=i: x[:, i : i + 2]) for i in (0, 2)},
}


def numbers(row: Mapping[str, float | None]) -> dict[str, float]:
    return {key: math.nan if value is None else value for key, value in row.items()}


def near(exact: Mapping[str, float | None]) -> Any:
    return pytest.approx(numbers(exact), rel=1e-9, abs=1e-13, nan_ok=True)


def check(rows: list[Any], every: int = EVERY) -> None:
    layers, metrics = rows
    steps = dense_run()
    monitored = [step for step in range(1, STEPS + 1) if step % every == 0]
    assert [row["step"] for row in layers] == sorted(monitored * (len(SHAPES) + len(SLICES)))
    for row in layers:
        dense = steps[row["step"] - 1]
        name, cut = SLICES.get(row["layer"], (row["layer"], np.asarray))
        g, w, u = (cut(x) for x in dense[name])
        assert row.get("of") == (name if row["layer"] in SLICES else None)
        assert row["norm"] == pytest.approx(math.sqrt((g * g).sum()), rel=1e-9)
        assert row["rms"] == pytest.approx(math.sqrt((g * g).mean()), rel=1e-9)
        if name == "frozen":  # its weight isn't read
            continue
        exact = expected(g, w, u)
        if row["step"] == 1:  # nobody has seen the weights before
            exact |= dict.fromkeys(("update_norm", "update_to_weight", "cos_update"))
        assert exact["weight_norm"] is not None
        assert row["grad_to_weight"] == pytest.approx(row["norm"] / exact["weight_norm"], rel=1e-9)
        assert numbers({key: row.get(key) for key in exact}) == near(exact), row["layer"]
    for row in metrics:
        if row["step"] not in monitored:
            assert "weight_norm" not in row
            continue
        assert row["loss_finite"] is (row["step"] != 4)
        trained = [of for name, of in steps[row["step"] - 1].items() if name != "frozen"]
        g, w, u = (np.concatenate([of[i].ravel() for of in trained]) for i in range(3))
        exact = expected(g, w, u)
        if row["step"] == 1:
            exact |= dict.fromkeys(("update_norm", "update_to_weight", "cos_update"))
        assert numbers({key: row.get(key) for key in exact}) == near(exact)


@pytest.mark.slow
def test_every_topology_finds_what_one_process_does(ranks: Any, tmp_path: Path) -> None:
    found = ranks(4, train_all, tmp_path, timeout=300)
    for position, topology in enumerate(GRID):
        for each in found:
            costs = each[position][0]  # the first step also agrees on partial gradients
            assert costs[1:] == [({"c10d::allreduce_": 1}, {})] * (STEPS - 1), topology
        check(found[0][position][1])


@pytest.mark.parametrize("every", [1, 2])
def test_one_process(tmp_path: Path, every: int) -> None:
    check(train("single", tmp_path, every)[1], every)
    table = layer_charts(read_layers(tmp_path / "single" / "layers.jsonl", 10_000))[-1].table
    for head in ("update norm", "update / weight", "cos(gradient, weight)", "spectral norm"):
        assert f"last {head}" in table.heads
    assert any("experts[3]" in row[0] for row in table.rows)


def test_a_long_and_a_complex_parameter_and_one_that_is_trained_later(tmp_path: Path) -> None:
    made = {
        "long": nn.Parameter(torch.randn(1 << 21)),
        "z": nn.Parameter(torch.randn(3, dtype=torch.complex128)),
        "later": nn.Parameter(torch.ones(4), requires_grad=False),
    }
    monitor = {"every": 2, "dir": tmp_path, "cosines": True, "updates": True}
    clipper = distnorm.GradClipper(made, {"monitor": monitor})
    old = {}
    for _ in range(2):
        for parameter in (made["long"], made["z"]):
            parameter.grad = torch.randn_like(parameter)
        clipper.clip()
        if not old:
            old = {name: w.detach().clone() for name, w in made.items()}
            with torch.no_grad():
                for w in made.values():
                    w += 0.125
            made["later"].requires_grad_()
    clipper.close()
    for row in read(tmp_path / "layers.jsonl"):
        name = row["layer"]
        w, before = (np.asarray(x.detach().numpy(), dtype=np.complex128) for x in (made[name], old[name]))
        g = made[name].grad
        if g is None:
            assert row["update_norm"] == 0.0
            continue
        dense = np.asarray(g.numpy(), dtype=np.complex128)
        exact = [np.linalg.norm(w - before), (dense.conj() * w).sum().real / np.linalg.norm(w)]
        found = [row["update_norm"], row["cos_weight"] * row["norm"]]
        assert found == pytest.approx(exact, rel=1e-9)


def test_weights_of_another_course_are_no_update(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(4))
    clipper = distnorm.GradClipper(
        [("w", weight)], {"monitor": {"every": 1, "dir": tmp_path, "updates": True}}
    )
    for step in range(3):
        weight.grad = torch.ones(4)
        clipper.clip()
        with torch.no_grad():
            weight -= 0.5
        if step == 1:
            clipper.load_state_dict(clipper.state_dict())
    clipper.close()
    assert [row.get("update_norm") for row in read(tmp_path / "layers.jsonl")] == [None, 1.0, None]


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"slices": [{"params": ["none*"]}]}, "match parameters, found ..none"),
    ({"slices": [{"params": ["w"], "dim": 1, "size": 3}]}, "multiple of 3, found 'w' of shape"),
    ({"slices": [{"params": ["w"]}, {"params": ["*"]}]}, "in one entry, found 'w' in two"),
    ({"slices": [{"params": ["norm"], "dim": 1}]}, "expected a dim 1"),
    ({"spectral": ["norm"]}, "match parameters of two dims, found ..norm"),
]


def test_slices_that_are_none_are_refused() -> None:
    named = {name: nn.Parameter(whole(name, 0)) for name in ("w", "norm")}
    for monitor, message in MISTAKES:
        with pytest.raises(distnorm.ConfigError, match=message):
            distnorm.GradClipper(named, {"monitor": {"every": 1, **monitor}})
    for key in ("cosines", "updates"):
        with pytest.raises(distnorm.ConfigError, match=f"monitor.{key}"):
            distnorm.GradClipper(named, {"norm": {"type": "inf"}, "monitor": {"every": 1, key: True}})
        with pytest.raises(distnorm.ConfigError, match=r"expected monitor\.every"):
            distnorm.GradClipper(named, {"monitor": {key: True}})


def flat_slices() -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=True)
    return heard(
        lambda: distnorm.GradClipper(model, {"monitor": {"every": 1, "slices": [{"params": ["*weight"]}]}})
    )


def test_slices_of_flat_parameters_are_refused(ranks: Any) -> None:
    for kind, message in ranks(2, flat_slices):
        assert kind == "UnsupportedGradientError" and "monitor.slices" in message
