"""Values from the environment and from assignments."""

from __future__ import annotations

from pathlib import Path

import pytest

from distnorm.config import Config, load_config
from distnorm.errors import ConfigError
from tests.config.files import load, only, problems


def test_environment_comes_over_the_file_and_assignments_over_both(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "clip: {max_norm: 1, nonfinite: skip}"
    monkeypatch.setenv("DISTNORM_CLIP__MAX_NORM", "2e-1")
    monkeypatch.setenv("DISTNORM_TRAIN__MODEL__TIE_EMBEDDINGS", "false")
    config = load(file, text)
    assert (config.clip.max_norm, config.clip.nonfinite) == (0.2, "skip")
    assert config.train.model.tie_embeddings is False
    assert load(file, text, "clip.max_norm=3", "clip.max_norm = null").clip.max_norm is None
    assert load_config({}).clip.max_norm == load_config().clip.max_norm == 0.2


def test_an_override_replaces_a_section(file: Path) -> None:
    text = "train: {parallel: {dp_shard: 2, tp: 2}}"
    parallel = load(file, text, "train.parallel={tp: 4}", "train.output_dir=a=b").train.parallel
    assert (parallel.dp_shard, parallel.tp) == (1, 4)
    assert load(file, text, "train.output_dir=a=b").train.output_dir == "a=b"


def test_an_override_may_mend_the_file(file: Path) -> None:
    assert load(file, "clip: {max_norm: -1}", "clip.max_norm=1").clip.max_norm == 1.0


@pytest.mark.parametrize(
    ("assignment", "path", "message"),
    [
        ("clip.max_nrom=1", "clip.max_nrom", "unknown key; did you mean 'clip.max_norm'?"),
        ("cilp.max_norm=1", "cilp.max_norm", "unknown key; did you mean 'clip.max_norm'?"),
        ("max_norm=1", "max_norm", "unknown key; did you mean 'clip.max_norm'?"),
        ("clip.xyzzy=1", "clip.xyzzy", "unknown key; expected one of max_norm, nonfinite"),
        ("clip.max_norm.x=1", "clip.max_norm.x", "unknown key; clip.max_norm holds a value, not a section"),
        ("clip..max_norm=1", "clip..max_norm", "unknown key"),
        ("clip.max_norm=-1", "clip.max_norm", "expected a number >= 0, inf or null, found -1"),
        ("clip.max_norm='1'", "clip.max_norm", "found the string '1'; write the number 1"),
        ("clip.max_norm=", "clip.max_norm", "found no value; write null"),
        ("clip.max_norm=[1", "clip.max_norm", "not valid YAML"),
        ("clip.max_norm=*a", "clip.max_norm", "aliases are not followed"),
        ("clip.max_norm=!!python/name:os.system", "clip.max_norm", "the tag !!python/name:os.system is not"),
        ("clip={max_nrom: 1}", "clip.max_nrom", "unknown key; did you mean 'max_norm'?"),
        ("clip={max_norm: 1, max_norm: 2}", "clip.max_norm", "duplicate key"),
        (
            "clip=1",
            "clip",
            "expected a mapping with the keys max_norm, nonfinite, apply, overlap, policy, groups, found 1",
        ),
        ("clip.max_norm", "", "expected a key's path and a value, such as clip.max_norm=0.5"),
        ("=1", "", "expected a key's path and a value"),
        ("", "", "expected a key's path and a value"),
    ],
)
def test_a_wrong_assignment_is_named(assignment: str, path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({}, [assignment])
    problem = only(caught.value.problems)
    assert (problem.file, problem.line, problem.column) == (f"--set {assignment}", None, None)
    assert problem.path == path
    assert message in problem.message


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DISTNORM_CLIP__MAX_NROM", "1", "unknown key; did you mean 'DISTNORM_CLIP__MAX_NORM'?"),
        ("DISTNORM_MAX__NORM", "1", "unknown key"),
        ("DISTNORM_CLIP__MAX_NORM", "x", "expected a number >= 0, inf or null, found the string 'x'"),
        ("DISTNORM_CLIP__MAX_NORM", "", "found no value; write null"),
        ("DISTNORM_TRAIN__PARALLEL__TP", "3", "expected model.heads to be a multiple of parallel.tp = 3"),
        (
            "DISTNORM_CLIP_MAX_NORM",
            "1",
            "expected '__' between section and key; did you mean DISTNORM_CLIP__MAX_NORM?",
        ),
        ("DISTNORM_CILP_MAX_NORM", "1", "did you mean DISTNORM_CLIP__MAX_NORM?"),
        ("DISTNORM_TRAIN_XYZZY", "1", "expected '__' between section and key"),
    ],
)
def test_a_wrong_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        load_config()
    problem = only(caught.value.problems)
    assert (problem.file, problem.line) == (name, None)
    assert message in problem.message


@pytest.mark.parametrize("name", ["DISTNORM_PYTHON", "DISTNORM_LOG_LEVEL", "NOT_DISTNORM_CLIP__MAX_NROM"])
def test_variables_that_are_not_meant_are_ignored(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "x")
    assert load_config() == Config()


def test_problems_come_in_order_file_environment_assignments(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTNORM_TRAIN__STEPS", "0")
    found = problems(file, "clip: {max_norm: -1}\nnorm: {type: 0}", "train.seed=x", "a=1")
    expected = [str(file), str(file), "DISTNORM_TRAIN__STEPS", "--set train.seed=x", "--set a=1"]
    assert [problem.file for problem in found] == expected


def test_not_valid_yaml_still_reports_the_overrides(file: Path) -> None:
    assert [problem.line for problem in problems(file, "clip: {", "xyzzy=1")] == [1, None]
