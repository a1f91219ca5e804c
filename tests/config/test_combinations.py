"""What no run can have: sizes and degrees, and what one section asks for and another can't do."""

from __future__ import annotations

from pathlib import Path

import pytest

from distnorm.config import ClipConfig, Config, NormConfig, combinations
from distnorm.config.policy_models import NAMES
from distnorm.errors import ConfigError
from distnorm.measure.norms import norm
from distnorm.policies import policy_of
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


def test_replicas_are_compared_in_monitored_steps_only(file: Path) -> None:
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


ONLY_TOTAL = "expected a policy that goes by the total norm under backend deepspeed"


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        (
            "{norm: {type: inf}, clip: {policy: agc}}",
            (1, 36, "clip.policy"),
            "expected norm.type 2 under policy agc, which goes by the 2-norms of output units, found inf",
        ),
        ("{norm: {type: 3}, clip: {policy: {name: agc}}}", (1, 41, "clip.policy.name"), "found 3"),
        (
            "{norm: {type: 1}, clip: {groups: [{params: [a], policy: agc}]}}",
            (1, 57, "clip.groups[0].policy"),
            "expected norm.type 2 under policy agc",
        ),
        (
            "{norm: {type: 7}, clip: {policy: per_tensor}}",
            (1, 34, "clip.policy"),
            "expected an order up to 6.5, or inf, under policy per_tensor, for norms of single parameters; "
            "found norm.type 7",
        ),
        ("{norm: {type: 7}, clip: {policy: adagc}}", (1, 34, "clip.policy"), "or inf, under policy adagc"),
        ("{norm: {type: 7}, clip: {groups: [{params: [a]}]}}", (1, 34, "clip.groups"), "with clip.groups"),
        ("{norm: {type: 7}, monitor: {every: 5}}", (1, 36, "monitor.every"), "with monitor.every"),
        ("{norm: {type: 10001}}", (1, 15, "norm.type"), "expected at most 10000, or inf; found 10001"),
        (
            "{clip: {apply: optimizer, policy: value}}",
            (1, 16, "clip.apply"),
            "expected fused optimizers, which multiply by one number, to be enough for all that is clipped, "
            "found policy value, which multiplies nothing",
        ),
        (
            "{clip: {apply: optimizer, groups: [{params: [a]}]}}",
            (1, 16, "clip.apply"),
            "found clip.groups, which have coefficients of their own",
        ),
        (
            "{clip: {apply: optimizer, nonfinite: zero}}",
            (1, 16, "clip.apply"),
            "found nonfinite: zero, which no optimizer can do",
        ),
        (
            "{clip: {apply: optimizer}, train: {parallel: {backend: deepspeed}}}",
            (1, 16, "clip.apply"),
            "expected apply auto or scale under backend deepspeed",
        ),
        (
            "{clip: {overlap: true}, train: {parallel: {backend: deepspeed}}}",
            (1, 18, "clip.overlap"),
            "expected overlap = false under backend deepspeed",
        ),
        (
            "{clip: {groups: [{params: [a]}]}, train: {parallel: {backend: deepspeed}}}",
            (1, 17, "clip.groups"),
            "expected none under backend deepspeed, whose step scales all gradients alike, found 1",
        ),
        (
            "{clip: {policy: agc}, train: {parallel: {backend: deepspeed}}}",
            (1, 17, "clip.policy"),
            ONLY_TOTAL,
        ),
        (
            "{clip: {policy: agc}, train: {parallel: {backend: fsdp1}}}",
            (1, 17, "clip.policy"),
            "expected backend fsdp2 or ddp under policy agc",
        ),
    ],
)
def test_what_a_run_would_refuse_is_found_before_it(
    file: Path, text: str, place: Place, message: str
) -> None:
    problem = only(problems(file, text))
    assert (problem.line, problem.column, problem.path) == place
    assert message in problem.message


@pytest.mark.parametrize(
    "text",
    [
        "{norm: {type: inf}, clip: {policy: per_tensor}, monitor: {every: 1}}",
        "{norm: {type: 6.5}, clip: {policy: adagc, groups: [{params: [a]}]}, monitor: {every: 1}}",
        "{norm: {type: 100}, clip: {policy: zclip}}",
        "{clip: {policy: agc, apply: auto}, train: {parallel: {backend: ddp}}}",
        "{clip: {policy: zclip}, train: {parallel: {backend: deepspeed}}}",
    ],
)
def test_what_a_run_can_do_is_accepted(file: Path, text: str) -> None:
    load(file, text)


def test_conflicts_of_all_sections_are_found_at_once(file: Path) -> None:
    text = """\
norm: {type: 9}
clip: {max_norm: 1, policy: agc}
monitor: {replicas: true}
train: {model: {dim: 130}}
"""
    assert [problem.path for problem in problems(file, text)] == [
        "clip.max_norm",
        "clip.policy",
        "monitor.replicas",
        "train.model.dim",
    ]


def test_an_override_that_makes_a_conflict_is_its_place(file: Path) -> None:
    problem = only(problems(file, "clip: {policy: agc}", "norm.type=inf"))
    assert (problem.file, problem.path) == ("--set norm.type=inf", "norm.type")
    with pytest.raises(ConfigError, match=r"clip\.policy\.name: expected norm\.type 2 under policy agc"):
        Config(norm=NormConfig(type=3.0), clip=ClipConfig(policy={"name": "agc"}))  # type: ignore[arg-type]


def test_validate_knows_what_policies_and_norms_can_do() -> None:
    """The configuration can't ask the library itself, which imports torch."""
    does = {"parameters": "a coefficient for each parameter", "units": "for each output unit"}
    for name in NAMES:
        clip = ClipConfig(policy={"name": name})  # type: ignore[arg-type]
        reads = policy_of(clip).reads
        assert (name in combinations.BEYOND_TOTAL) == (reads != "total"), name
        assert does.get(reads, "") in combinations.BEYOND_TOTAL.get(name, ""), name
    norm(combinations.LARGEST_ORDER)
    with pytest.raises(ConfigError):
        norm(combinations.LARGEST_ORDER + 1)
    assert norm(combinations.LARGEST_PARAMETER_ORDER).width == 1
    assert norm(combinations.LARGEST_PARAMETER_ORDER + 0.01).width > 1
