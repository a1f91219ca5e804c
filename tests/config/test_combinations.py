"""Sizes and degrees that no run can have."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.files import Place, load, only, places, problems


@pytest.mark.parametrize(
    ("train", "place", "message"),
    [
        (
            "model: {dim: 130}",
            (1, 22, "model.dim"),
            "model.dim to be a multiple of model.heads = 4, found 130",
        ),
        (
            "model: {heads: 3}",
            (1, 24, "model.heads"),
            "model.dim to be a multiple of model.heads = 3, found 128",
        ),
        (
            "parallel: {tp: 3}",
            (1, 24, "parallel.tp"),
            "model.heads to be a multiple of parallel.tp = 3, found 4",
        ),
        (
            "model: {context: 127}, parallel: {tp: 2, sequence_parallel: true}",
            (1, 47, "parallel.tp"),
            "model.context to be a multiple of parallel.tp = 2 under sequence_parallel, found 127",
        ),
        ("parallel: {pp: 5}", (1, 24, "parallel.pp"), "expected at most model.layers = 4 stages, found 5"),
        ("model: {layers: 1}, parallel: {pp: 2}", (1, 44, "parallel.pp"), "at most model.layers = 1 stages"),
        (
            "parallel: {backend: ddp, dp_shard: 2}",
            (1, 44, "parallel.dp_shard"),
            "expected dp_shard = 1 under backend ddp, which shards nothing, found 2; "
            "its replicas are dp_replicate",
        ),
        (
            "parallel: {backend: ddp, tp: 2}",
            (1, 38, "parallel.tp"),
            "expected tp = 1 under backend ddp, found 2; "
            "fsdp2 with dp_replicate keeps whole replicas as ddp does",
        ),
        (
            "parallel: {backend: fsdp1, pp: 2}",
            (1, 40, "parallel.pp"),
            "expected pp = 1 under backend fsdp1, found 2; pipelines go with fsdp2, ddp and deepspeed",
        ),
        (
            "parallel: {backend: deepspeed, tp: 2}",
            (1, 44, "parallel.tp"),
            "expected tp = 1 under backend deepspeed, found 2; the trainer has tensor parallelism with fsdp2",
        ),
        (
            "deepspeed: {zero_stage: 0}, parallel: {backend: deepspeed, dp_shard: 2}",
            (1, 78, "parallel.dp_shard"),
            "expected dp_shard = 1 under deepspeed.zero_stage = 0, which shards nothing, found 2",
        ),
        (
            "parallel: {backend: deepspeed, dp_replicate: 2}",
            (1, 54, "parallel.dp_replicate"),
            "expected dp_replicate = 1 under deepspeed.zero_stage = 2, found 2; its ranks are dp_shard",
        ),
        (
            "deepspeed: {zero_stage: 1}, parallel: {backend: deepspeed, pp: 2}",
            (1, 72, "parallel.pp"),
            "expected pipeline = true under backend deepspeed with pp = 2, found false",
        ),
        (
            "parallel: {backend: deepspeed}, deepspeed: {pipeline: true}",
            (1, 63, "deepspeed.pipeline"),
            "expected zero_stage 0 or 1 in a pipeline, which DeepSpeed runs with no other, found 2",
        ),
        (
            "parallel: {backend: deepspeed}, deepspeed: {zero_stage: 0, offload: true}",
            (1, 77, "deepspeed.offload"),
            "expected offload = false under deepspeed.zero_stage = 0, which leaves the optimizer to torch",
        ),
        (
            "parallel: {backend: deepspeed}, checkpoint: {every: 2}",
            (1, 61, "checkpoint.every"),
            "expected every = null under backend deepspeed, whose checkpoints are of another kind, found 2",
        ),
        (
            "parallel: {backend: deepspeed}, dtype: float64",
            (1, 48, "dtype"),
            "expected float32 or bfloat16 under backend deepspeed, which reduces no other, found float64",
        ),
        (
            "parallel: {dp_replicate: 3}",
            (1, 34, "parallel.dp_replicate"),
            "data.batch_size to be a multiple of 3 (dp_replicate 3), found 16",
        ),
        (
            "data: {batch_size: 6}, parallel: {dp_replicate: 2, dp_shard: 2}",
            (1, 28, "data.batch_size"),
            "data.batch_size to be a multiple of 4 (dp_replicate 2 * dp_shard 2), found 6",
        ),
        (
            "parallel: {pp: 3}",
            (1, 24, "parallel.pp"),
            "data.batch_size to be a multiple of 6 (microbatches 6), found 16",
        ),
        (
            "parallel: {pp: 2, dp_shard: 2, microbatches: 3}",
            (1, 37, "parallel.dp_shard"),
            "data.batch_size to be a multiple of 6 (dp_shard 2 * microbatches 3), found 16",
        ),
        (
            "parallel: {pp: 4, microbatches: 2}",
            (1, 41, "parallel.microbatches"),
            "expected at least pp = 4 micro-batches, found 2",
        ),
    ],
)
def test_impossible_combinations_point_at_the_key(file: Path, train: str, place: Place, message: str) -> None:
    problem = only(problems(file, f"train: {{{train}}}"))
    assert (problem.line, problem.column, problem.path) == (place[0], place[1], f"train.{place[2]}")
    assert message in problem.message


def test_replicas_are_compared_in_looks_only(file: Path) -> None:
    problem = only(problems(file, "monitor: {replicas: true}"))
    assert (problem.line, problem.column, problem.path) == (1, 21, "monitor.replicas")
    assert "expected monitor.every, which says when" in problem.message
    assert load(file, "monitor: {replicas: true, every: 3}").monitor.replicas


@pytest.mark.parametrize(
    "train",
    [
        "parallel: {pp: 1, microbatches: 7}",
        "parallel: {tp: 1, sequence_parallel: true}, model: {context: 127}",
        "parallel: {backend: ddp, dp_replicate: 4, pp: 2}",
        "parallel: {dp_replicate: 2, dp_shard: 2, tp: 2}",
        "parallel: {dp_shard: 2, tp: 2, pp: 2, sequence_parallel: true}",
    ],
)
def test_possible_combinations(file: Path, train: str) -> None:
    load(file, f"train: {{{train}}}")


def test_several_combinations_are_reported_together_and_with_other_mistakes(file: Path) -> None:
    text = "train:\n  stps: 3\n  model: {dim: 10, heads: 3}\n  parallel: {tp: 2, pp: 9, dp_shard: 0}\n"
    assert places(problems(file, text)) == [
        (2, 3, "train.stps"),
        (3, 27, "train.model.heads"),
        (4, 18, "train.parallel.tp"),
        (4, 25, "train.parallel.pp"),
        (4, 38, "train.parallel.dp_shard"),
    ]


def test_nothing_is_concluded_from_a_value_that_is_wrong_itself(file: Path) -> None:
    assert places(problems(file, "train: {model: {dim: 90, haeds: 3}}")) == [(1, 26, "train.model.haeds")]
    assert places(problems(file, "train: {model: {dim: 90, heads: x}}")) == [(1, 33, "train.model.heads")]
    assert places(problems(file, "train: {model: {dim: 90, heads: 3, heads: 9}}")) == [
        (1, 36, "train.model.heads")
    ]


def test_an_override_is_blamed_before_the_file(file: Path) -> None:
    problem = only(problems(file, "train: {model: {dim: 128, heads: 4}}", "train.model.dim=130"))
    assert (problem.file, problem.path) == ("--set train.model.dim=130", "train.model.dim")
