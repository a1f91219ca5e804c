"""`clip.policy` and `clip.groups`: what they mean, and their mistakes at their places."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distnorm.config import ClipConfig, Config, load_config
from distnorm.errors import ConfigError
from distnorm.policies import policy_of
from tests.config.files import EXAMPLES, Place, load, only, places, problems

NAMES = (
    "'constant', 'schedule', 'value', 'per_tensor', 'agc', 'percentile', 'zclip', 'adagc', 'aggc', "
    "'skip_spikes'"
)
# The table of the issue, and what it leaves open.
DEFAULTS: dict[str, dict[str, Any]] = {
    "constant": {},
    "schedule": {"curve": "constant", "points": [], "warmup": 0, "warmup_factor": 1.0},
    "value": {},
    "per_tensor": {"rms": False},
    "agc": {"lambda": 0.01, "eps": 1e-3},
    "percentile": {"p": 10.0, "window": 1024},
    "zclip": {"alpha": 0.97, "z_t": 2.5, "warmup": 25, "eps": 1e-6, "mode": "zscore",
              "clip_option": "adaptive_scaling", "clip_factor": 1.0, "skip_update_on_spike": False},
    "adagc": {"lambda": 1.05, "beta": 0.98, "warmup": 100, "warmup_max_norm": 1.0, "eps": 0.0,
              "warmup_gamma": "clipped"},
    "aggc": {"beta": 0.95, "low": 0.95, "high": 0.6, "min_norm": 0.0, "raise_small": False, "max_down": 0.9,
             "max_up": 1.1, "low_late": 0.98, "high_late": 0.7, "total_steps": None, "switch": 0.4,
             "transition": 0.3},
    "skip_spikes": {"k": 6.0, "window": 128, "after": 64, "on": "norm", "above": None},
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_name_alone_is_the_policy_with_its_defaults(file: Path, name: str) -> None:
    config = load(file, f"clip: {{policy: {name}}}")
    assert config.model_dump()["clip"]["policy"] == {"name": name, **DEFAULTS[name]}
    assert config == load(file, f"clip: {{policy: {{name: {name}}}}}") == load(file, config.to_yaml())
    assert hash(config) == hash(load_config({"clip": {"policy": name}}))
    policy = policy_of(config.clip)
    assert policy.name == name
    # In code the defaults are the same.
    signature = inspect.signature(type(policy)).parameters.values()
    in_code = {p.name.rstrip("_"): p.default for p in signature if p.kind is p.KEYWORD_ONLY}
    assert in_code == {**DEFAULTS[name], **({"points": ()} if "points" in in_code else {})}


def test_the_default_clips_to_max_norm() -> None:
    assert Config().clip.policy.name == "constant"
    assert Config() == load_config({"clip": {"policy": "constant", "groups": []}})


GROUPS = """\
clip:
  max_norm: 1.0
  policy: {name: zclip, alpha: 0.9}
  groups:
    - {params: ["*.experts.*"], max_norm: 0.5}
    - name: heads
      params: ["head.*", "lm_?"]
      policy: {name: adagc, lambda: 1.2}
      norm: shared
"""


def test_groups(file: Path) -> None:
    config = load(file, GROUPS)
    first, second = config.clip.groups
    assert (first.name, first.params, first.max_norm) == ("*.experts.*", ("*.experts.*",), 0.5)
    assert (first.policy.name, first.norm) == ("constant", "own")
    assert (second.name, second.params, second.norm) == ("heads", ("head.*", "lm_?"), "shared")
    assert config.model_dump()["clip"]["groups"][1]["policy"]["lambda"] == 1.2
    assert (
        load(file, config.to_yaml()) == config == load_config(config) == load_config(config, ["train.seed=0"])
    )
    assert yaml.safe_load(config.to_yaml()) == config.model_dump()
    assert {config: 1}[load_config(yaml.safe_load(GROUPS))] == 1
    assert [policy_of(config.clip, group).name for group in (None, first, second)] == [
        "zclip",
        "constant",
        "adagc",
    ]


def test_a_key_that_yaml_1_1_takes_for_true_is_written_in_quotes() -> None:
    config = load_config({"clip": {"policy": {"name": "skip_spikes", "on": "loss"}}})
    assert yaml.safe_load(config.to_yaml()) == config.model_dump()


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        (
            "{policy: zcilp}",
            (1, 16, "clip.policy"),
            f"expected one of {NAMES}, found the string 'zcilp'; did you mean 'zclip'?",
        ),
        (
            "{policy: {name: zcilp, alpha: 7}}",
            (1, 23, "clip.policy.name"),
            f"expected one of {NAMES}, found the string 'zcilp'; did you mean 'zclip'?",
        ),
        ("{policy: {name: [1]}}", (1, 23, "clip.policy.name"), f"expected one of {NAMES}, found a list"),
        ("{policy: {nmae: zclip}}", (1, 17, "clip.policy.nmae"), "unknown key; did you mean 'name'?"),
        ("{policy: {z_t: 2}}", (1, 16, "clip.policy.name"), f"expected one of {NAMES}, found no such key"),
        ("{policy: 3}", (1, 16, "clip.policy"), "or a mapping with the key name, found 3"),
        ("{policy: }", (1, 15, "clip.policy"), "or a mapping with the key name, found no value"),
        ("{policy: null}", (1, 16, "clip.policy"), "or a mapping with the key name, found null"),
        (
            "{policy: {name: zclip, alhpa: 0.9}}",
            (1, 30, "clip.policy.alhpa"),
            "unknown key; did you mean 'alpha'?",
        ),
        # A parameter of another policy is none of this one.
        (
            "{policy: {name: zclip, beta: 0.9}}",
            (1, 30, "clip.policy.beta"),
            "unknown key; expected one of name, alpha, z_t, warmup, eps, mode, clip_option, clip_factor, "
            "skip_update_on_spike",
        ),
        (
            "{policy: {name: zclip, alpha: 2}}",
            (1, 37, "clip.policy.alpha"),
            "expected a number >= 0 and <= 1, found 2",
        ),
        (
            "{policy: {name: percentile, window: 1}}",
            (1, 43, "clip.policy.window"),
            "expected an integer >= 2",
        ),
        (
            "{policy: {name: agc, lambda: 0}}",
            (1, 36, "clip.policy.lambda"),
            "expected a number > 0, found 0",
        ),
        (
            "{policy: {name: skip_spikes, on: los}}",
            (1, 40, "clip.policy.on"),
            "found the string 'los'; did you mean 'loss'?",
        ),
        ("{alpha: 0.9}", (1, 8, "clip.alpha"), "unknown key; did you mean 'clip.policy.alpha'?"),
        # What is fine by itself and impossible together.
        (
            "{max_norm: 1, policy: agc}",
            (1, 18, "clip.max_norm"),
            "expected max_norm = null under policy agc, which has no max norm, found 1.0",
        ),
        (
            "{policy: {name: skip_spikes, window: 50}}",
            (1, 44, "clip.policy.window"),
            "expected at most policy.window = 50, which never holds more, found 64",
        ),
        (
            "{policy: {name: schedule, curve: cosine}}",
            (1, 40, "clip.policy.curve"),
            "expected points under curve cosine, found none",
        ),
        (
            "{policy: {name: schedule, points: [{step: 0, factor: 1}]}}",
            (1, 41, "clip.policy.points"),
            "expected no points under curve constant, found 1",
        ),
        (
            "{policy: {name: schedule, curve: steps, points: [{step: 5, factor: 1}, {step: 5, factor: 2}]}}",
            (1, 85, "clip.policy.points[1].step"),
            "expected a step after 5, that of the point before, found 5",
        ),
        # Groups.
        ("{groups: {}}", (1, 16, "clip.groups"), "expected a list, found an empty mapping"),
        (
            "{groups: [experts]}",
            (1, 17, "clip.groups[0]"),
            "a mapping with the keys name, params, max_norm, policy, norm, found the string 'experts'",
        ),
        ("{groups: [*a]}", (1, 17, "clip.groups[0]"), "aliases are not followed; write the value out"),
        (
            "{groups: [{max_norm: 1}]}",
            (1, 17, "clip.groups[0].params"),
            "expected a list that is not empty, found no such key",
        ),
        (
            "{groups: [{params: []}]}",
            (1, 26, "clip.groups[0].params"),
            "expected a list that is not empty, found an empty list",
        ),
        (
            "{groups: [{params: a}]}",
            (1, 26, "clip.groups[0].params"),
            "expected a list that is not empty, found the string 'a'",
        ),
        (
            "{groups: [{params: [a, 3]}]}",
            (1, 30, "clip.groups[0].params[1]"),
            "expected a string that is not empty, found 3; put it in quotes",
        ),
        (
            "{groups: [{parms: [a]}]}",
            (1, 18, "clip.groups[0].parms"),
            "unknown key; did you mean 'params'?",
        ),
        (
            "{groups: [{params: [a], nonfinite: skip}]}",
            (1, 31, "clip.groups[0].nonfinite"),
            "unknown key; did you mean 'clip.nonfinite'?",
        ),
        (
            "{groups: [{params: [a], name: null}]}",
            (1, 37, "clip.groups[0].name"),
            "expected a string, found null",
        ),
        (
            "{groups: [{params: [a], policy: adgac}]}",
            (1, 39, "clip.groups[0].policy"),
            "found the string 'adgac'; did you mean 'adagc'?",
        ),
        (
            "{groups: [{params: [a], policy: adagc, max_norm: 2}]}",
            (1, 56, "clip.groups[0].max_norm"),
            "expected max_norm = null under policy adagc",
        ),
        (
            "{groups: [{params: [a]}, {params: [b, c], name: a}]}",
            (1, 55, "clip.groups[1].name"),
            "expected another name than that of groups[0], found 'a'",
        ),
    ],
)
def test_one_mistake_is_one_problem_at_its_place(file: Path, text: str, place: Place, message: str) -> None:
    problem = only(problems(file, f"clip: {text}"))
    assert (problem.line, problem.column, problem.path) == place
    assert message in problem.message


MANY = """\
clip:
  max_norm: 1
  policy: adagc
  groups:
    - {parms: [a], max_norm: -1}
    - {params: ["*.x"], policy: {name: agcc}}
    - params: ["*.y"]
      policy:
        name: skip_spikes
        afer: 3
    - {params: [z], norm: theirs}
norm: {type: 0}
"""


def test_all_mistakes_at_once(file: Path) -> None:
    assert places(problems(file, MANY)) == [
        (2, 13, "clip.max_norm"),
        (5, 8, "clip.groups[0].parms"),
        (5, 30, "clip.groups[0].max_norm"),
        (6, 40, "clip.groups[1].policy.name"),
        (10, 9, "clip.groups[2].policy.afer"),
        (11, 27, "clip.groups[3].norm"),
        (12, 14, "norm.type"),
    ]


def test_overrides_reach_into_a_policy(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def policy(text: str, *overrides: str) -> dict[str, Any]:
        chosen: dict[str, Any] = load(file, text, *overrides).model_dump()["clip"]["policy"]
        return chosen

    half = {"name": "zclip", **DEFAULTS["zclip"], "alpha": 0.5}
    assert policy("{}", "clip.policy=zclip")["name"] == "zclip"
    assert policy("clip: {policy: zclip}", "clip.policy.alpha=0.5") == half
    assert policy("{}", "clip.policy.name=zclip", "clip.policy.alpha=0.5") == half
    assert policy("clip: {policy: {name: adagc, beta: 0.1}}", "clip.policy={name: zclip, alpha: 0.5}") == half
    assert load_config(
        load_config({"clip": {"policy": "zclip"}}), ["clip.policy.alpha=0.5"]
    ).clip == ClipConfig(policy={"name": "zclip", "alpha": 0.5})
    assert len(load(file, GROUPS, "clip.groups=[{params: [a]}]").clip.groups) == 1
    monkeypatch.setenv("DISTNORM_CLIP__POLICY__ALPHA", "0.5")
    assert policy("clip: {policy: zclip}") == half


@pytest.mark.parametrize(
    ("assignment", "path", "message"),
    [
        ("clip.policy.alhpa=1", "clip.policy.alhpa", "unknown key; did you mean 'clip.policy.alpha'?"),
        ("clip.policy.beta=1", "clip.policy.beta", "unknown key; expected one of name, alpha"),
        ("clip.policy.alpha=x", "clip.policy.alpha", "found the string 'x'"),
        ("clip.policy=zcilp", "clip.policy", "did you mean 'zclip'?"),
        ("clip.policy.name=zcilp", "clip.policy.name", "did you mean 'zclip'?"),
        ("clip.groups.name=a", "clip.groups.name", "clip.groups holds a value, not a section"),
        ("clip.groups=[{params: [a], policy: 1}]", "clip.groups[0].policy", "found 1"),
    ],
)
def test_a_wrong_override_of_a_policy_is_named(assignment: str, path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"clip": {"policy": "zclip"}}, [assignment])
    problem = only(caught.value.problems)
    assert (problem.file, problem.path) == (f"--set {assignment}", path)
    assert message in problem.message


def test_a_parameter_without_a_policy_s_name_is_named_by_its_override(file: Path) -> None:
    problem = only(problems(file, "{}", "clip.policy.alpha=0.9"))
    assert (problem.file, problem.path) == ("--set clip.policy.alpha=0.9", "clip.policy.name")


def test_in_code_too() -> None:
    with pytest.raises(ConfigError, match=r"<config>: groups\[0\]\.policy: expected one of .*'zclip'"):
        ClipConfig(groups=[{"params": ["a"], "policy": "zclp"}])
    group = {"params": ("a",), "policy": {"name": "zclip"}}
    given_ = {"clip": {"groups": (group,)}}
    assert load_config(given_).clip.groups[0].params == ("a",)
    assert given_ == {"clip": {"groups": (group,)}}, "what is given stays as it is"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.floats()
    | st.sampled_from(["a", "agc", "zclip", "norm"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "params", "policy", "norm", "alpha", "points", "step", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@EXAMPLES
@given(policy=JSON, groups=st.lists(JSON, max_size=3))
def test_any_value_is_a_config_or_a_config_error(policy: Any, groups: list[Any]) -> None:
    try:
        config = load_config({"clip": {"policy": policy, "groups": groups}})
    except ConfigError as error:
        assert all(problem.path.startswith("clip.") for problem in error.problems)
    else:
        assert load_config(yaml.safe_load(config.to_yaml())) == config
