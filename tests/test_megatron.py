"""Megatron-core's layout, on modules that bear its attributes: the norm, and lies in the attributes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distnorm
from distnorm import testing
from distnorm.integrations.megatron import attach_optimizer
from distnorm.testing import dense_norm
from tests.megatron_layout import (
    LR,
    World,
    chunks,
    dense_gradients,
    expected_piece,
    optimizer_of,
    trained,
)

testing.preload("distnorm.integrations.megatron", "tests.megatron_layout")

WORLDS = {
    "tp2 x pp2 x dp2, ep2, distributed": ((2, 2, 2, 2), "distributed"),
    "pp2 x dp3, distributed": ((1, 2, 3, 1), "distributed"),
    "tp2 x pp2 x dp2, ep2": ((2, 2, 2, 2), "whole"),
    "tp2 x dp2, ep4 over both, distributed": ((2, 1, 2, 4, True), "distributed"),
}


def steps(sizes: tuple[int, ...], kind: str) -> list[float]:
    world = World(*sizes)
    stages = chunks(world)
    optimizer = optimizer_of(world, stages, kind)
    clipping = attach_optimizer(optimizer, stages, pg_collection=world.groups)
    norm = dense_norm(dense_gradients())
    norms = []
    for step in (1, 2):
        done, found, _ = optimizer.step()
        assert done and found == float(clipping.last.total_norm)
        norms.append(found)
        for p in trained(stages):  # by the whole optimizer, or this rank's run
            value, gradient = expected_piece(world, p, "value"), expected_piece(world, p, "gradient")
            for holder, start, stop in held_of(optimizer, p):
                moved = (value - step * LR * gradient / (norm + 1e-6)).view(-1)[start:stop]
                close = {"rtol": 1e-2, "atol": 1e-2} if holder.dtype == torch.bfloat16 else {}
                torch.testing.assert_close(holder.view(-1), moved.to(holder.dtype), **close)
            p.main_grad = gradient
    clipping.remove()
    assert optimizer.config.clip_grad == 1.0
    assert "step" not in vars(optimizer)
    return norms


def held_of(optimizer: Any, p: Any) -> list[tuple[torch.Tensor, int, int]]:
    if not hasattr(optimizer, "chained_optimizers"):
        return [(p.detach(), 0, p.numel())]
    found = []
    for inner in optimizer.chained_optimizers:
        for parameter, shard in inner.pairs():
            if parameter is p:
                held = inner._get_model_param_range_map(p)["param"]
                found.append((shard, held.start, held.end))
    return found


@pytest.mark.parametrize("layout", WORLDS)
def test_the_norm_is_that_of_one_process_and_nothing_is_named(ranks, layout):
    sizes, kind = WORLDS[layout]
    for norms in ranks(sizes[0] * sizes[1] * sizes[2], steps, sizes, kind):
        assert norms == pytest.approx([dense_norm(dense_gradients())] * 2, rel=1e-5)


Lie = Callable[[World, list[nn.Module]], None]


def of_layers(change: Callable[[World, Any], None]) -> Lie:
    def lie(world: World, stages: list[nn.Module]) -> None:
        for stage in stages:
            for each in stage.module.module.decoder.layers:
                if each.layer_number == 2:
                    change(world, each)

    return lie


def norm_is_marked_as_cut(world: World, layer: Any) -> None:
    vars(layer.input_layernorm.weight).update(tensor_model_parallel=True, partition_dim=0)


def weight_is_not_marked(world: World, layer: Any) -> None:
    del layer.self_attention.linear_proj.weight.tensor_model_parallel


def weight_without_sizes(world: World, layer: Any) -> None:
    del layer.self_attention.linear_proj.input_size
    weight_is_not_marked(world, layer)


def bias_is_not_marked(world: World, layer: Any) -> None:
    del layer.self_attention.linear_qkv.bias.tensor_model_parallel


def wrong_dim(world: World, layer: Any) -> None:
    layer.self_attention.linear_qkv.weight.partition_dim = 1


def dim_that_is_none(world: World, layer: Any) -> None:
    layer.self_attention.linear_qkv.bias.partition_dim = 1


def no_dim(world: World, layer: Any) -> None:
    del layer.self_attention.linear_proj.weight.partition_dim
    del layer.self_attention.linear_qkv.weight.partition_dim  # 0 is what it says anyway


def copy_is_not_shared(world: World, stages: list[nn.Module]) -> None:
    for stage in stages:
        if hasattr(stage.module.module, "output_layer"):
            del stage.module.module.output_layer.weight.shared


def original_is_shared_too(world: World, stages: list[nn.Module]) -> None:
    for stage in stages:
        if hasattr(stage.module.module, "embedding"):
            stage.module.module.embedding.word_embeddings.weight.shared = True


def dense_as_expert(world: World, layer: Any) -> None:
    layer.mlp.router.weight.allreduce = False
    layer.mlp.router.weight.main_grad += world.at_ep  # reduced over expert-data-parallel ranks alone


def norm_as_expert(world: World, layer: Any) -> None:
    layer.input_layernorm.weight.allreduce = False


def expert_as_dense(world: World, layer: Any) -> None:
    del layer.mlp.experts.local_experts[0].linear_fc1.weight.allreduce


def gradient_is_not_summed(world: World, layer: Any) -> None:
    weight = layer.input_layernorm.weight
    del weight.sequence_parallel
    weight.main_grad *= 0.25 + 0.5 * world.at_tp


def not_summed_though_marked(world: World, layer: Any) -> None:
    layer.input_layernorm.weight.main_grad *= 0.25 + 0.5 * world.at_tp


def one_rank_says_otherwise(world: World, layer: Any) -> None:
    if dist.get_rank() == 1:
        layer.self_attention.linear_proj.bias.sequence_parallel = False


LIES: dict[str, tuple[Lie, str, str]] = {
    "norm as cut": (of_layers(norm_is_marked_as_cut), "input_layernorm.weight", "tensor_model_parallel=True"),
    "weight not marked": (of_layers(weight_is_not_marked), "proj.weight", "no tensor_model_parallel"),
    "and no sizes": (of_layers(weight_without_sizes), "proj.weight", "no tensor_model_parallel"),
    "bias not marked": (of_layers(bias_is_not_marked), "qkv.bias", "no tensor_model_parallel"),
    "wrong dim": (of_layers(wrong_dim), "qkv.weight", "partition_dim=1.*along 0"),
    "dim that is none": (of_layers(dim_that_is_none), "qkv.bias", "partition_dim=1, and 1 dims"),
    "no dim": (of_layers(no_dim), "proj.weight", "partition_dim=-1.*along 1"),
    "copy not shared": (copy_is_not_shared, "word_embeddings.weight", "no shared=True"),
    "all shared": (original_is_shared_too, "word_embeddings.weight", "shared=True"),
    "dense as expert": (of_layers(dense_as_expert), "router.weight", "allreduce=False"),
    "norm as expert": (of_layers(norm_as_expert), "input_layernorm.weight", "allreduce=False"),
    "expert as dense": (of_layers(expert_as_dense), "linear_fc1.weight", "no allreduce=False"),
    "not summed": (of_layers(gradient_is_not_summed), "input_layernorm.weight", "no sequence_parallel"),
    "nor so": (of_layers(not_summed_though_marked), "input_layernorm.weight", "sequence_parallel=True"),
    "one rank": (of_layers(one_rank_says_otherwise), "proj.bias", "sequence_parallel=False on rank 1"),
}


def lies(sizes: tuple[int, ...], kind: str, names: list[str]) -> dict[str, str]:
    world = World(*sizes)
    told = {}
    for name in names:
        lie = LIES[name][0]
        stages = chunks(world)
        lie(world, stages)
        optimizer = optimizer_of(world, stages, kind)
        try:
            attach_optimizer(optimizer, stages, pg_collection=world.groups)
            optimizer.step()
            told[name] = "nothing"
        except distnorm.DistnormError as error:
            told[name] = f"{type(error).__name__}: {error}".replace("\n", " ")
        dist.barrier()
    return told


TIED = ["copy not shared", "all shared"]
OTHERS = [name for name in LIES if name not in TIED]


@pytest.mark.parametrize(
    ("kind", "sizes", "names"),
    [
        ("distributed", (2, 1, 2, 2), OTHERS),
        ("distributed", (2, 2, 1, 1), TIED),
        ("whole", (2, 2, 2, 2), ["norm as cut", "copy not shared"]),
    ],
)
@pytest.mark.slow
def test_each_lie_is_named_on_all_ranks(ranks, kind, sizes, names):
    for told in ranks(sizes[0] * sizes[1] * sizes[2], lies, sizes, kind, names):
        assert list(told) == names
        for name in names:
            _, parameter, attribute = LIES[name]
            found = rf"parameter '[^']*{parameter}': [^']*{attribute}"
            assert re.search(found, told[name]), (name, told[name])


DOCS = (Path(__file__).parent.parent / "docs" / "integrations.md").read_text(encoding="utf-8")


def documented(title: str) -> str:
    section = DOCS.split(f"\n## {title}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


def snippet(title: str) -> float:
    names: dict[str, Any] = {}
    if title == "Megatron-core":
        names["model"] = chunks(world := World(1, 1, 1, 1))
        names["optimizer"] = optimizer_of(world, names["model"], "whole")
    exec(documented(title), names)
    return names.get("grad_norm") or float(names["clipper"].last.total_norm)


@pytest.mark.parametrize(
    ("title", "size", "norm"),
    [("Megatron-core", 1, dense_norm(dense_gradients())), ("Hand-written parallelism", 2, 208**0.5)],
)
def test_the_documents_scripts_run(ranks, title, size, norm):
    assert ranks(size, snippet, title) == [pytest.approx(norm, rel=1e-5)] * size


def used_rightly() -> list[str]:
    """Limits, skips, a second attach, and calls of methods one by one."""
    world = World(1, 1, 1, 1)
    stages = chunks(world)
    optimizer = optimizer_of(world, stages, "distributed", clip_grad=2.0)
    told = []
    try:
        attach_optimizer(optimizer, stages, {"clip": {"max_norm": 1.0}}, pg_collection=world.groups)
    except distnorm.ConfigError as error:
        told.append(str(error))
    groups = {"pg_collection": world.groups}
    alone = attach_optimizer(optimizer.chained_optimizers[0], stages, **groups)
    try:
        attach_optimizer(optimizer, stages, **groups)
    except distnorm.DistnormError as error:
        assert "nothing is attached to, found HandMadeDistributed" in str(error)
    else:
        raise AssertionError("would clip twice")
    alone.remove()
    clipping = attach_optimizer(optimizer, stages, {"clip": {"nonfinite": "skip"}}, **groups)
    for wrong in (
        lambda: attach_optimizer(optimizer, stages, pg_collection=world.groups),
        lambda: optimizer.clip_grad_norm(3.0),
        lambda: optimizer.chained_optimizers[0].get_grad_norm(),
        lambda: attach_optimizer(torch.optim.SGD(trained(stages)), stages, **groups),
        lambda: attach_optimizer(optimizer_of(world, stages, "whole"), stages[:0], **groups),
        lambda: distnorm.attach(stages, optimizer.chained_optimizers[0].optimizer),
    ):
        try:
            wrong()
        except distnorm.DistnormError as error:
            told.append(str(error))
    optimizer.prepare_grads()  # clips
    norm = dense_norm(dense_gradients())
    assert optimizer.get_grad_norm() == optimizer.clip_grad_norm(2.0) == pytest.approx(norm, rel=1e-5)
    assert clipping.clipper.state_dict()["steps"] == 1
    weight = next(trained(stages))
    weight.main_grad[0] = torch.nan
    before = [p.detach().clone() for p in trained(stages)]
    done, found, _ = optimizer.step()
    assert not done and not torch.isfinite(torch.tensor(found)) and bool(clipping.last.skipped)
    assert all(torch.equal(p, b) for p, b in zip(trained(stages), before, strict=True))
    clipping.remove()
    stepped = optimizer.chained_optimizers[0].optimizer
    distnorm.attach(stepped.param_groups[0]["params"], stepped).remove()
    return told


def test_limits_skips_and_wrong_uses(ranks):
    limit, twice, other, part, torchs, strangers, inside = ranks(1, used_rightly)[0]
    assert "clip_grad: expected 0, or 1.0" in limit
    assert "nothing is attached to" in twice
    assert "clip_grad: expected 2.0" in other
    assert "ChainedOptimizer's method" in part
    assert "expected a MegatronOptimizer" in torchs and "SGD" in torchs
    assert "none of them" in strangers
    assert "nothing is attached to, found SGD, which clips already" in inside
