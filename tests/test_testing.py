"""The rank pool and the dense oracle."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distnorm.testing import RankError, RankFailure, RankTimeout, dense_norm

PRELOADING = """
import sys
from distnorm.testing import RankPool, preload

def has_imported(*names):
    return [name in sys.modules for name in names]

if __name__ == "__main__":
    pool = RankPool(1)
    preload("wave", "no_such_module")
    print(pool.run(1, has_imported, "wave", "no_such_module", "mailbox"))
"""


class TwoArguments(Exception):
    """Can be pickled but not unpickled."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def rank_and_environment(offset: int) -> tuple[int, int, str, str, int]:
    names = os.environ["RANK"] + os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]
    return dist.get_rank() + offset, dist.get_world_size(), *names, torch.get_num_threads()


def summed() -> torch.Tensor:
    tensor = torch.full((3,), float(dist.get_rank() + 1), dtype=torch.bfloat16)
    dist.all_reduce(tensor)
    return tensor


def dtensor_matmul(world_size: int) -> float:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    product = distribute_tensor(torch.arange(16.0).reshape(4, 4), mesh, [Shard(0)]).pow(2)
    assert isinstance(product, DTensor)
    return float(product.full_tensor().sum())


def fsdp_gradient(axes: tuple[int, int]) -> float:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5)
    fully_shard(model, mesh=init_device_mesh("cpu", axes, mesh_dim_names=("dp_replicate", "dp_shard")))
    model(torch.ones(2, 6)).sum().backward()
    assert isinstance(model.weight.grad, DTensor)
    return float(model.weight.grad.full_tensor().sum())


def fails_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(0.2)
        raise TwoArguments("the", "root")
    dist.all_reduce(torch.ones(2))


def fails_everywhere() -> None:
    dist.barrier()
    raise KeyError(f"rank {dist.get_rank()}")


def dies_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.all_reduce(torch.ones(2))


def hangs_on(rank: int) -> int:
    if dist.get_rank() == rank:
        dist.recv(torch.ones(1), src=0)
    return rank


def sees(name: str) -> str | None:
    return os.environ.get(name)


def test_results_come_in_rank_order_from_a_group_of_exactly_that_size(ranks):
    for size in (3, 1, 4):
        assert ranks(size, rank_and_environment, 10) == [
            (10 + rank, size, f"{rank}{rank}", str(size), 1) for rank in range(size)
        ]


def test_tensors_are_returned_by_value(ranks):
    results = ranks(3, summed)
    assert all(torch.equal(result, torch.full((3,), 6.0, dtype=torch.bfloat16)) for result in results)


@pytest.mark.slow
def test_meshes_of_alternating_sizes_leave_nothing_behind(ranks):
    expected = float(sum(i * i for i in range(16)))
    for size, axes in ((4, (2, 2)), (2, (1, 2)), (4, (1, 4)), (3, (1, 3)), (4, (4, 1))):
        assert ranks(size, dtensor_matmul, size) == [expected] * size
        assert ranks(size, fsdp_gradient, axes) == [60.0] * size


def test_ranks_see_the_environment_of_the_caller(ranks, monkeypatch):
    monkeypatch.setenv("DISTNORM_POOL_TEST", "here")
    assert ranks(2, sees, "DISTNORM_POOL_TEST") == ["here", "here"]
    monkeypatch.delenv("DISTNORM_POOL_TEST")
    assert ranks(1, sees, "DISTNORM_POOL_TEST") == [None]


def test_the_root_failure_is_reported_not_the_neighbours_broken_connection(ranks):
    with pytest.raises(
        RankError, match=r"rank 2 of 4 failed first:(.|\n)*raise TwoArguments(.|\n)*the root"
    ) as caught:
        ranks(4, fails_on, 2)
    root, *others = caught.value.failures
    assert (root.rank, root.type_name, root.is_root, root.exception) == (2, "TwoArguments", True, None)
    assert sorted(failure.rank for failure in others) == [0, 1, 3]
    assert not any(failure.is_root for failure in others)


def test_a_rank_that_dies_is_named_with_its_exit_code(ranks):
    with pytest.raises(RankError, match=r"rank 1 of 3 failed first:\n.*exit code 7"):
        ranks(3, dies_on, 1)


def test_expected_errors_are_returned_in_rank_order(ranks):
    failures = ranks(3, fails_everywhere, expect_errors=True)
    assert [(f.rank, f.type_name, f.message) for f in failures] == [
        (r, "KeyError", f"'rank {r}'") for r in range(3)
    ]
    assert all(isinstance(f.exception, KeyError) for f in failures)
    one, other = ranks(2, fails_on, 0, expect_errors=True)
    assert (one.type_name, other.is_root) == ("TwoArguments", False)
    assert isinstance(other, RankFailure)


def test_a_hang_is_ended_with_the_stacks_of_the_ranks_that_hang_and_the_pool_lives_on(ranks):
    start = time.monotonic()
    with pytest.raises(RankTimeout, match=r"^rank 1 still running after 2 s\nrank 1:\n(.|\n)*in hangs_on"):
        ranks(3, hangs_on, 1, timeout=2)
    assert time.monotonic() - start < 10
    assert len(ranks(3, summed)) == 3


def test_a_collective_ends_at_the_groups_own_timeout(ranks):
    result = ranks(2, hangs_on, 1, collective_timeout=0.5, expect_errors=True)
    assert result[0] == 1
    assert not result[1].is_root


def test_a_body_that_cannot_be_pickled_and_a_size_out_of_range_are_refused(ranks):
    with pytest.raises((AttributeError, pickle.PicklingError)):
        ranks(1, lambda: None)
    with pytest.raises(ValueError, match="world_size is 9; this pool runs 1 to 8 ranks"):
        ranks(9, summed)


@pytest.mark.parametrize(
    ("p", "expected"),
    [(1.0, 12.0), (2.0, math.sqrt(50.0)), (3.0, (27 + 64 + 125) ** (1 / 3)), (math.inf, 5.0)],
)
def test_dense_norm_of_hand_chosen_numbers(p, expected):
    tensors = {
        "a": torch.tensor([3.0, -4.0]),
        "b": torch.tensor([[5.0]], dtype=torch.float16),
        "c": torch.empty(0, 2),
    }
    assert dense_norm(tensors, p) == pytest.approx(expected, rel=1e-15)


def test_dense_norm_at_the_edges_of_the_range():
    assert dense_norm({}) == 0.0
    assert dense_norm({"zero": torch.zeros(3)}, 3.0) == 0.0
    assert dense_norm({"z": torch.tensor([3 + 4j])}) == 5.0
    assert dense_norm({"huge": torch.full((4,), 1e300, dtype=torch.float64)}) == 2e300
    assert dense_norm({"tiny": torch.full((4,), 1e-300, dtype=torch.float64)}) == 2e-300
    assert dense_norm({"inf": torch.tensor([1.0, -math.inf])}) == math.inf
    assert math.isnan(
        dense_norm({"inf": torch.tensor([math.inf]), "nan": torch.tensor([math.nan])}, math.inf)
    )


@pytest.mark.slow
def test_preloaded_modules_are_there_in_every_rank(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(PRELOADING)
    command = [sys.executable, "main.py"]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=180)
    assert done.stdout == "[[True, False, False]]\n", done.stderr
